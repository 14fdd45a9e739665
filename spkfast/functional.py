"""The ops as functions of tensors, like torch.nn.functional."""

from spkfast.ops import (
    add_noise,
    attentive_stats_pool,
    attentive_stats_pool_from_hidden,
    change_speed,
    log_mel_fbank,
    margin_softmax_loss,
    paired_dot,
    reverberate,
    se_res2net_block,
    tdnn_layer,
    top_moments,
    weighted_moments,
    weighted_moments_from_hidden,
)

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
