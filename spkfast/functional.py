"""The ops as functions of tensors, like torch.nn.functional."""

from spkfast.ops import (
    attentive_stats_pool,
    attentive_stats_pool_from_hidden,
    log_mel_fbank,
    margin_softmax_loss,
    se_res2net_block,
    tdnn_layer,
    weighted_moments,
    weighted_moments_from_hidden,
)

__all__ = [
    "attentive_stats_pool",
    "attentive_stats_pool_from_hidden",
    "log_mel_fbank",
    "margin_softmax_loss",
    "se_res2net_block",
    "tdnn_layer",
    "weighted_moments",
    "weighted_moments_from_hidden",
]
