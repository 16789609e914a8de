"""Train Energy-Based World Models at scale."""

from ebwm_dist import torchvision_compat as torchvision_compat  # Its import prepares that of torchvision.

__version__ = "0.1.0"
