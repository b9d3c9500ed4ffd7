"""Figures that the papers publish, with their sources. Data only."""

# De & Smith 2020 (arXiv 2002.10444), table 3: ResNet50-V2 on ImageNet, top-1
# and top-5 in percent by batch size.
IMAGENET = {
  'Batch normalization': {
    256: (75.0, 92.2),
    1024: (74.9, 92.1),
    4096: (74.9, 91.9),
  },
  'Fixup': {256: (74.8, 91.8), 1024: (74.6, 91.7), 4096: (73.0, 90.6)},
  'SkipInit + Biases': {
    256: (74.9, 91.9),
    1024: (74.6, 91.8),
    4096: (70.8, 89.2),
  },
  'Fixup + Dropout': {
    256: (75.8, 92.5),
    1024: (75.6, 92.5),
    4096: (74.8, 91.8),
  },
  'Regularized SkipInit': {
    256: (75.6, 92.4),
    1024: (75.5, 92.5),
    4096: (72.7, 90.7),
  },
}
