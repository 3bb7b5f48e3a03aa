"""Each test is one claim about transformers."""

from pathlib import Path

import pytest
import torch

from pgsuite.nn.transformer import LanguageModel, Transformer


def transformer(seed: int = 0) -> Transformer:
    return Transformer(7, width=16, layers=2, heads=2, generator=torch.Generator().manual_seed(seed))


def texts(t: int = 9, n: int = 5) -> torch.Tensor:
    return torch.randint(7, (t, n))


@torch.no_grad()
def test_reading_token_by_token_with_the_cache_is_reading_at_once() -> None:
    net, tokens, real = transformer(), texts(), torch.ones(9, 5, dtype=torch.bool)
    real[:3, 1] = real[:1, 2] = False
    whole = net(tokens, real)
    first, cache = net.forward_with_cache(tokens[:4], real[:4], {})
    parts = [first]
    for t in range(4, 9):
        features, cache = net.forward_with_cache(tokens[t : t + 1], real[t : t + 1], cache)
        parts.append(features)
    assert (torch.cat(parts) - whole)[real].abs().max() < 1e-5


@torch.no_grad()
def test_nothing_that_comes_later_is_seen() -> None:
    net, tokens = transformer(), texts()
    other = tokens.clone()
    other[5:] = texts()[5:]
    assert torch.equal(net(tokens)[:5], net(other)[:5])


@torch.no_grad()
def test_what_stands_in_padding_changes_not_a_bit() -> None:
    net, tokens, real = transformer(), texts(), torch.ones(9, 5, dtype=torch.bool)
    real[:3, 1] = real[7:, 2] = False
    other = tokens.where(real, texts())
    assert not torch.equal(tokens, other)
    assert torch.equal(net(tokens, real)[real], net(other, real)[real])


@torch.no_grad()
def test_how_much_padding_there_is_changes_no_more_than_rounding() -> None:
    net, tokens = transformer(), texts()
    pad = torch.zeros(4, 5, dtype=torch.long)
    real = torch.cat([pad.bool(), torch.ones_like(tokens).bool(), pad.bool()])
    padded = net(torch.cat([pad, tokens, pad]), real)[4:13]
    assert (padded - net(tokens)).abs().max() < 1e-5


def test_a_language_model_comes_back_from_its_file(tmp_path: Path) -> None:
    model, tokens = LanguageModel(transformer(), torch.Generator().manual_seed(1)), texts()
    model.save(tmp_path / "model.pt", words=["one", "two"])
    assert torch.equal(LanguageModel.load(tmp_path / "model.pt")(tokens), model(tokens))
    (tmp_path / "other.pt").write_text("nothing")
    for name, complaint in (("none.pt", "no language model at"), ("other.pt", "is no language model")):
        with pytest.raises(ValueError, match=complaint):
            LanguageModel.load(tmp_path / name)
