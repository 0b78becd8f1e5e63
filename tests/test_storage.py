"""Atomic files and safetensors."""

import os
from pathlib import Path

import pytest
import torch

from tersor.errors import CheckpointError, MaskError
from tersor.storage import (
    load_masks,
    read_tensors,
    replacing_file,
    replacing_folder,
    save_masks,
    write_tensors,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_replaces_the_old_file_and_leaves_nothing_beside_it(tmp_path):
    write_text(tmp_path / "new" / "a.txt", "one")
    assert write_text(tmp_path / "new" / "a.txt", "zwei €").read_bytes() == "zwei €".encode()
    assert names(tmp_path / "new") == ["a.txt"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_interrupted_file_keeps_the_old_one(tmp_path, interruption):
    path = write_text(tmp_path / "a.txt", "old")

    def write_half():
        with replacing_file(path) as temporary:
            temporary.write_text("ha")
            raise interruption

    with pytest.raises(interruption):
        write_half()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_folder_takes_the_place_of_the_old_one_whole(tmp_path):
    target = tmp_path / "checkpoint"
    for word in ("old", "new"):
        with replacing_folder(target) as folder:
            (folder / f"{word}.txt").write_text(word)
    assert names(target) == ["new.txt"]
    assert names(tmp_path) == ["checkpoint"]


def test_interrupted_folder_keeps_the_old_one(tmp_path):
    target = tmp_path / "checkpoint"
    with replacing_folder(target) as folder:
        (folder / "a.txt").write_text("old")

    def write_half():
        with replacing_folder(target) as folder:
            (folder / "a.txt").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert (target / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["checkpoint"]


def test_interrupt_between_the_two_renames_puts_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "checkpoint"
    with replacing_folder(target) as folder:
        (folder / "a.txt").write_text("old")
    rename = Path.rename

    def interrupted(self, new):
        if self.suffix == ".tmp":
            raise KeyboardInterrupt
        return rename(self, new)

    monkeypatch.setattr(Path, "rename", interrupted)

    def replace():
        with replacing_folder(target):
            pass

    with pytest.raises(KeyboardInterrupt):
        replace()
    assert (target / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["checkpoint"]


def test_permissions_follow_the_umask(tmp_path):
    mask = os.umask(0o022)
    try:
        write_text(tmp_path / "a.txt", "")
        write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    finally:
        os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


def test_tensors_round_trip_whatever_their_dtype_stride_and_sharing(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "base": base,
        "transposed": base.t(),
        "row": base[1],
        "expanded": torch.ones(1).expand(3),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.tensor([2.0])),
    }
    read, metadata = read_tensors(write_tensors(tmp_path / "a.safetensors", tensors, {"by": "test"}))
    assert metadata == {"by": "test"}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor.detach())


def test_tensors_read_own_their_memory(tmp_path):
    path = write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(4096)})
    read, _ = read_tensors(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(read["a"], torch.ones(4096))


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"PK\x03\x04" + bytes(100), b"{}" * 50])
def test_foreign_file_names_path_and_remedy(tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.pt.*no safetensors.*Pickled files"):
        read_tensors(path)


def test_truncated_file(tmp_path):
    path = write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="damaged"):
        read_tensors(path)


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"a\.safetensors: there is no such file"):
        read_tensors(tmp_path / "a.safetensors")


def test_unwritable_tensor_keeps_the_old_file(tmp_path):
    path = write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match="with values"):
        write_tensors(path, {"a": torch.ones(1, device="meta")})
    assert torch.equal(read_tensors(path)[0]["a"], torch.ones(1))
    assert names(tmp_path) == ["a.safetensors"]


def test_masks_round_trip_as_bool(tmp_path):
    masks = {
        "": {"scale": torch.tensor([True, False])},
        "layer1.0": {"weight": torch.eye(2), "_input_0": torch.tensor(True)},
    }
    loaded = load_masks(save_masks(masks, tmp_path / "masks.safetensors"))
    assert loaded.keys() == masks.keys()
    assert torch.equal(loaded[""]["scale"], torch.tensor([True, False]))
    assert torch.equal(loaded["layer1.0"]["weight"], torch.eye(2).bool())
    assert loaded["layer1.0"]["_input_0"].item() is True


def test_masks_hold_only_zeros_and_ones(tmp_path):
    with pytest.raises(MaskError, match=r"masks\['fc'\]\['weight'\]"):
        save_masks({"fc": {"weight": torch.tensor([0.5])}}, tmp_path / "masks.safetensors")
    assert names(tmp_path) == []


def test_other_tensors_are_no_masks(tmp_path):
    path = write_tensors(tmp_path / "model.safetensors", {"fc::weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match="holds no masks"):
        load_masks(path)
