"""The definitions: what each op means, in plain torch, for any floating dtype and device."""

from spkfast.reference.log_mel_fbank import log_mel_fbank, log_mel_fbank_backward
from spkfast.reference.margin_softmax_loss import margin_softmax_loss

__all__ = ["log_mel_fbank", "log_mel_fbank_backward", "margin_softmax_loss"]
