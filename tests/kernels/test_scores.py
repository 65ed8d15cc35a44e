"""Echo and induction scores against a plain, quadratic form."""

import pytest
import torch

from razor_kernels import scores_triton
from razor_kernels.scores import COPIES, repeat_scores, row_lse


def quadratic(query, key, scale: float, period: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, with whole attention matrices in fp64."""
    key = key.repeat_interleave(query.shape[0] // key.shape[0], 0).double()
    logits = query.double() @ key.transpose(1, 2) * scale
    length = query.shape[1]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = logits.masked_fill(later, -torch.inf).softmax(-1)
    echo = torch.zeros(query.shape[0], dtype=torch.float64)
    induction = torch.zeros_like(echo)
    for i in range(1 + period, length):
        for j in range(i - period, 0, -period):
            echo += weights[:, i, j]
            induction += weights[:, i, j + 1]
    count = (COPIES - 1) * period
    return echo / count, induction / count


@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("period", [2, 13, 63, 200])
def test_scores_equal_the_quadratic_form(period: int, group: int) -> None:
    """Tiles and diagonals give what whole matrices give."""
    torch.manual_seed(period)
    length = 1 + COPIES * period
    query, key = torch.randn(2 * group, length, 16) * 2, torch.randn(2, length, 16) * 2
    got = repeat_scores(query, key, 0.3, period)
    want = quadratic(query, key, 0.3, period)
    torch.testing.assert_close(got.echo.double(), want[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(got.induction.double(), want[1], rtol=1e-4, atol=1e-7)


def test_a_perfect_head_scores_one() -> None:
    """A head that looks only where induction looks has induction 1, echo 0."""
    period, length = 50, 201
    place = torch.zeros(length, dtype=torch.long)
    place[1:] = torch.arange(length - 1) % period
    one_hot = torch.eye(period)[place]
    key = one_hot.unsqueeze(0) * 100
    key[:, 0] = 0
    echo = repeat_scores(key, key, 1.0, period)
    assert echo.echo.item() == pytest.approx(0.6, abs=0.1)  # the token itself matches too
    assert echo.induction.item() < 1e-3
    query = torch.eye(period)[(place + 1) % period].unsqueeze(0) * 100
    induction = repeat_scores(query, key, 1.0, period)
    assert induction.induction.item() == pytest.approx(1.0, abs=0.02)
    assert induction.echo.item() < 1e-3


@pytest.mark.parametrize("length", [1, 31, 64, 111])
def test_row_lse_over_any_tiles(length: int) -> None:
    """The row sums do not depend on the tile."""
    torch.manual_seed(0)
    query, key = torch.randn(3, length, 8), torch.randn(3, length, 8)
    torch.testing.assert_close(row_lse(query, key, 0.5, tile=32), row_lse(query, key, 0.5))


def test_another_length_is_refused() -> None:
    """Four copies and a first token, nothing else."""
    with pytest.raises(ValueError, match="has 41 tokens, not 40"):
        repeat_scores(torch.zeros(1, 40, 8), torch.zeros(1, 40, 8), 1.0, 10)


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]


def test_the_kernel_scores_on_cuda(monkeypatch) -> None:
    """There the kernel is called with the layer's heads, and its mass is the score."""
    calls = []

    def repeat_mass(*arguments):
        calls.append(arguments)
        return torch.tensor([[3.0, 6.0], [0.0, 30.0]])

    monkeypatch.setattr(scores_triton, "repeat_mass", repeat_mass)
    query, key = torch.zeros(2, 41, 8).as_subclass(OnCuda), torch.zeros(1, 41, 8)
    got = repeat_scores(query, key, 0.5, 10, soft_cap=2.0)
    assert got.echo.tolist() == pytest.approx([0.1, 0.2])
    assert got.induction.tolist() == pytest.approx([0.0, 1.0])
    assert calls[0][0] is query
    assert calls[0][2:] == (0.5, 10, COPIES, 2.0)
    repeat_scores(torch.zeros(1, 41, 512).as_subclass(OnCuda), torch.zeros(1, 41, 512), 1.0, 10)
    assert len(calls) == 1, "the kernel holds no such head"
