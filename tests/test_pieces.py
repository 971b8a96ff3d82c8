"""Tensors in pieces, and the files of a model shared out to ranks.

Run: python -m pytest tests/test_pieces.py -q
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from puna.core.checkpoint import pieces, shards
from puna.core.config import size
from puna.core.parameters import parameter_shapes


def written(folder: Path, blocks: dict[str, tuple[int, Tensor]]) -> Path:
    """A file for each block of rows of the tensor `a`, by where it begins."""
    folder.mkdir()
    (folder / "like").touch()
    for name, (begin, tensor) in blocks.items():
        piece = pieces.Piece(tensor, (begin, 0))
        shards.save_tensors(
            {"a": tensor},
            folder / f"{name}.safetensors",
            like=folder / "like",
            metadata=pieces.metadata({"a": piece}),
        )
    return folder


def test_any_block_is_put_together_from_pieces(tmp_path):
    tensor = torch.arange(70.0).view(10, 7)
    folder = written(tmp_path / "a", {"x": (6, tensor[6:]), "y": (0, tensor[:6].clone())})
    stored = pieces.open_pieces(folder)["a"]
    assert stored.shape == (10, 7)
    for rows in (slice(0, 10), slice(6, 10), slice(2, 4), slice(5, 7), slice(4, 4)):
        for columns in (slice(0, 7), slice(3, 5)):
            assert torch.equal(stored[rows, columns], tensor[rows, columns])
    gap = written(tmp_path / "b", {"x": (7, tensor[7:]), "y": (0, tensor[:6].clone())})
    with pytest.raises(ValueError, match="b does not hold all of a; resume from"):
        pieces.open_pieces(gap)["a"][slice(5, 8), slice(0, 7)]


@pytest.mark.parametrize("said", ["", "[]", "{}", '{"a": 1}', '{"a": {"saved_offsets": [0]}}',
                                  '{"a": {"saved_offsets": [-1, 0]}}', "{" * 10])  # fmt: skip
def test_places_that_are_none_are_refused(tmp_path, said):
    save_file({"a": torch.ones(2, 2)}, tmp_path / "x.safetensors", {pieces.PLACES: said})
    with pytest.raises(ValueError, match="x.safetensors does not say where its piece"):
        pieces.open_pieces(tmp_path)


def test_a_model_is_shared_out_in_files_about_alike():
    shape = size("70b")
    sizes = {
        name: 4 * torch.Size(each).numel() for name, each in parameter_shapes(shape, "lm").items()
    }
    for ranks in (8, 64, 256):
        files = shards.shared_out(sizes, ranks)
        assert [name for names in files for name in names] == list(sizes)
        assert len(files) == (56 if ranks == 8 else ranks)  # 276 GB in files of at most 5
        share = sum(sizes.values()) / len(files)
        most = max(sum(sizes[name] for name in names) for names in files)
        assert most <= share + max(sizes.values()) and share < 1.2 * shards.SHARD_BYTES
    assert shards.shared_out({"a": 10, "b": 10}, 64) == [["a", "b"]]
