"""The definitions: what each op means, in plain torch, for any floating dtype and device."""

from spkfast.reference.add_noise import add_noise
from spkfast.reference.attentive_stats_pool import attentive_stats_pool
from spkfast.reference.attentive_stats_pool_from_hidden import attentive_stats_pool_from_hidden
from spkfast.reference.change_speed import change_speed
from spkfast.reference.log_mel_fbank import log_mel_fbank
from spkfast.reference.margin_softmax_loss import MarginForm, margin_softmax_loss, margin_softmax_sums
from spkfast.reference.paired_dot import paired_dot
from spkfast.reference.reverberate import reverberate
from spkfast.reference.se_res2net_block import SERes2NetParams, se_res2net_block
from spkfast.reference.tdnn_layer import Precision, TdnnParams, tdnn_layer
from spkfast.reference.top_moments import top_moments

__all__ = [
    "MarginForm",
    "Precision",
    "SERes2NetParams",
    "TdnnParams",
    "add_noise",
    "attentive_stats_pool",
    "attentive_stats_pool_from_hidden",
    "change_speed",
    "log_mel_fbank",
    "margin_softmax_loss",
    "margin_softmax_sums",
    "paired_dot",
    "reverberate",
    "se_res2net_block",
    "tdnn_layer",
    "top_moments",
]
