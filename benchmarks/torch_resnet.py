"""ResNet-50 V1.5 and its training step in PyTorch, as most people run it."""

import torch
from torch import nn
from torch.nn import functional

CUDA = torch.cuda.is_available()


class Bottleneck(nn.Module):
  def __init__(self, inputs: int, width: int, stride: int):
    super().__init__()
    sizes = ((inputs, width, 1), (width, width, 3), (width, 4 * width, 1))
    self.convs = nn.ModuleList(
      nn.Conv2d(i, o, k, stride if k == 3 else 1, k // 2, bias=False)
      for i, o, k in sizes
    )
    self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _ in sizes)
    self.shortcut = nn.Sequential()
    if stride > 1 or inputs != 4 * width:
      self.shortcut = nn.Sequential(
        nn.Conv2d(inputs, 4 * width, 1, stride, bias=False),
        nn.BatchNorm2d(4 * width),
      )

  def forward(self, x):
    y = x
    for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
      y = norm(conv(y))
      y = functional.relu(y) if i < 2 else y
    return functional.relu(y + self.shortcut(x))


def resnet50(classes: int) -> nn.Module:
  layers = [
    nn.Conv2d(3, 64, 7, 2, 3, bias=False),
    nn.BatchNorm2d(64),
    nn.ReLU(),
    nn.MaxPool2d(3, 2, 1),
  ]
  inputs = 64
  for stage, blocks in enumerate((3, 4, 6, 3)):
    width = 64 * 2**stage
    for block in range(blocks):
      stride = 2 if stage > 0 and block == 0 else 1
      layers.append(Bottleneck(inputs, width, stride))
      inputs = 4 * width
  head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)
  return nn.Sequential(*layers, *head)


def make_step(batch_size: int, side: int, classes: int):
  """Makes a function that starts one step.

  bfloat16 autocast on a GPU, float32 on a CPU, as the other networks.
  """
  device = 'cuda' if CUDA else 'cpu'
  layout = {'memory_format': torch.channels_last}
  model = resnet50(classes).to(device, **layout)
  images = torch.randn(batch_size, 3, side, side, device=device).to(**layout)
  labels = torch.randint(classes, (batch_size,), device=device)
  optimizer = torch.optim.SGD(
    model.parameters(), 0.1, 0.9, nesterov=True, weight_decay=1e-4
  )

  @torch.compile
  def loss_fn(images, labels):
    with torch.autocast(device, torch.bfloat16, enabled=CUDA):
      logits = model(images)
    return functional.cross_entropy(logits.float(), labels)

  def step():
    optimizer.zero_grad(set_to_none=True)
    loss_fn(images, labels).backward()
    optimizer.step()

  return step


def wait(out: None) -> None:
  """Waits until all steps are done."""
  if CUDA:
    torch.cuda.synchronize()


def peak_bytes() -> int:
  """Peak bytes of GPU memory."""
  return torch.cuda.max_memory_allocated()
