"""On PYTHONPATH while MegaBlocks is installed: leaves its CUDA extension out of the build."""

import torch.utils.cpp_extension

torch.utils.cpp_extension.CUDA_HOME = None
