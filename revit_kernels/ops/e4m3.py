"""Numbers in e4m3, the float8 of which ops make products."""

import torch

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
E4M3_SINCE = (8, 9)  # compute capability of the first tensor cores that take them
GROUP = 128  # columns that share a scale where a row has more than one
