"""Position: where the halves of r fall, and the sinusoids."""

import torch

from sasa.nn.position import embedding_rows, embeddings_by_head, sinusoidal_encoding


def halves(channels, heads, split, taps=3):
    rows = embedding_rows(channels, heads, split)
    row = torch.arange(1.0, rows * taps + 1).view(rows, taps)
    col = -torch.arange(1.0, (channels - rows) * taps + 1).view(channels - rows, taps)
    return [half.view(heads, -1, taps) for half in embeddings_by_head(row, col, heads, split)]


def test_per_head_gives_every_head_both_halves():
    row, col = halves(8, 2, "per_head")
    assert row.tolist() == [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]]]
    assert torch.equal(col, -row)


def test_across_heads_gives_rows_to_the_first_and_columns_to_the_last():
    row, col = halves(8, 2, "across_heads")
    assert (row != 0).any(2).tolist() == [[True] * 4, [False] * 4]
    assert (col != 0).any(2).tolist() == [[False] * 4, [True] * 4]


def test_last_head_repeats_the_last_head_of_across_heads():
    across, last = halves(12, 3, "across_heads"), halves(12, 3, "last_head")
    for whole, repeated in zip(across, last, strict=True):
        assert torch.equal(repeated, whole[-1:].repeat(3, 1, 1))


def test_odd_head_width_leaves_the_larger_half_to_the_columns():
    row, col = halves(6, 2, "per_head")
    assert row.shape == (2, 1, 3) and row.all()
    assert col.shape == (2, 2, 3) and col.all()


def test_every_pixel_has_its_own_encoding_of_bounded_size():
    x = torch.zeros(1, 8, 11, 13, dtype=torch.float64)
    encoding = sinusoidal_encoding(x)
    assert encoding.shape == (8, 11, 13) and encoding.dtype == x.dtype
    assert encoding.abs().max() <= 1
    assert len({tuple(column) for column in encoding.flatten(1).T.tolist()}) == 11 * 13


def test_encoding_is_rows_in_one_half_and_columns_in_the_other():
    encoding = sinusoidal_encoding(torch.zeros(1, 6, 5, 7))
    assert torch.equal(encoding[:3], encoding[:3, :, :1].expand(-1, -1, 7))
    assert torch.equal(encoding[3:], encoding[3:, :1].expand(-1, 5, -1))


def test_encoding_of_few_channels():
    for channels in (1, 2, 3):
        assert sinusoidal_encoding(torch.zeros(1, channels, 4, 4)).isfinite().all()
