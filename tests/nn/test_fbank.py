"""The front-end module: the op with its spec, nothing in the state dict, errors where it is made."""

import pytest
import torch

import spkfast
from spkfast import functional


def test_is_the_op():
    spec = spkfast.frontend("wespeaker")
    x = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0)) / 10
    lengths = torch.tensor([3000, 1234])
    layer = spkfast.nn.Fbank(spec)
    for have, want in zip(layer(x, lengths), functional.log_mel_fbank(x, lengths, spec=spec), strict=True):
        assert torch.equal(have, want)
    assert layer(x)[1].tolist() == [17, 17]
    assert not layer.state_dict() and spec.hash in repr(layer)


def test_validate_reaches_the_op():
    x = torch.full((1, 800), torch.nan)
    with pytest.raises(spkfast.InputError, match="row 0 holds a NaN"):
        spkfast.nn.Fbank(spkfast.frontend("kaldi"))(x)
    spkfast.nn.Fbank(spkfast.frontend("kaldi"), validate=False)(x)


def test_unsupported_spec_is_refused_at_once():
    with pytest.raises(
        spkfast.InputError, match="log_mel_fbank computes center=False only, the front-end asks for True"
    ):
        spkfast.nn.Fbank(spkfast.frontend("kaldi", center=True))
