"""The operations of a Llama, one file each; the folder needs torch and triton."""

from .attention.operation import attention as attention
from .backend import use_backend as use_backend
from .decode_attention import decode_attention as decode_attention
from .gae import gae as gae
from .linear_loss.cross_entropy import linear_cross_entropy as linear_cross_entropy
from .linear_loss.logprobs import linear_logprobs as linear_logprobs
from .rms_norm import add_rms_norm as add_rms_norm
from .rms_norm import rms_norm as rms_norm
from .rope import rope as rope
from .rope import rope_tables as rope_tables
from .sample import sample as sample
from .swiglu import swiglu as swiglu
