"""Why it works: what networks do at initialization, and to their gradients."""
