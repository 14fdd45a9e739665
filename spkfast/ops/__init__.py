"""The public functions of the ops, with their checks, fakes and gradients."""

from spkfast import backends

backends.load()

# The libraries hold the schemas.
from spkfast.ops.add_noise import add_noise  # noqa: E402
from spkfast.ops.attentive_stats_pool import attentive_stats_pool, weighted_moments  # noqa: E402
from spkfast.ops.attentive_stats_pool_from_hidden import (  # noqa: E402
    attentive_stats_pool_from_hidden,
    weighted_moments_from_hidden,
)
from spkfast.ops.change_speed import change_speed  # noqa: E402
from spkfast.ops.log_mel_fbank import log_mel_fbank  # noqa: E402
from spkfast.ops.margin_softmax_loss import margin_softmax_loss  # noqa: E402
from spkfast.ops.paired_dot import paired_dot  # noqa: E402
from spkfast.ops.reverberate import reverberate  # noqa: E402
from spkfast.ops.se_res2net_block import se_res2net_block  # noqa: E402
from spkfast.ops.tdnn_layer import tdnn_layer  # noqa: E402
from spkfast.ops.top_moments import top_moments  # noqa: E402

__all__ = [
    "add_noise",
    "attentive_stats_pool",
    "attentive_stats_pool_from_hidden",
    "change_speed",
    "log_mel_fbank",
    "margin_softmax_loss",
    "paired_dot",
    "reverberate",
    "se_res2net_block",
    "tdnn_layer",
    "top_moments",
    "weighted_moments",
    "weighted_moments_from_hidden",
]
