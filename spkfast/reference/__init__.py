"""The definitions: what each op means, in plain torch, for any floating dtype and device."""

from spkfast.reference.log_mel_fbank import log_mel_fbank
from spkfast.reference.margin_softmax_loss import margin_softmax_loss

__all__ = ["log_mel_fbank", "margin_softmax_loss"]
