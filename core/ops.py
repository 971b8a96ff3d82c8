"""The operations as the engine uses them: what `kernels` offers, under one import.

`use_backend` also takes "native" here: the operations and the generation of `puna.core._C`.
"""

from puna.core.native_loss import linear_cross_entropy as linear_cross_entropy
from puna.kernels import add_rms_norm as add_rms_norm
from puna.kernels import attention as attention
from puna.kernels import decode_attention as decode_attention
from puna.kernels import gae as gae
from puna.kernels import linear_logprobs as linear_logprobs
from puna.kernels import rms_norm as rms_norm
from puna.kernels import rope as rope
from puna.kernels import rope_tables as rope_tables
from puna.kernels import sample as sample
from puna.kernels import swiglu as swiglu
from puna.kernels import use_backend as use_backend
from puna.kernels.backend import BACKENDS
from puna.kernels.backend import forced as forced
from puna.kernels.sample import mix64 as mix64

BACKENDS.add("native")
