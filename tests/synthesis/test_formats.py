import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from qimera.assessment.data import load_labelled_images
from qimera.errors import ConfigError
from qimera.synthesis import formats
from qimera.synthesis.bank import SampleBank
from qimera.synthesis.formats import BankFormat, write_bank
from qimera.teacher.teacher import Teacher
from tests.command_line import INPUT, SMALL, qimera, said
from tests.networks import NUM_CLASSES


def test_npz_holds_images_and_labels_as_evaluate_reads_them(tmp_path: Path, bank: SampleBank) -> None:
    write_bank(bank, tmp_path / "bank.npz", "npz")
    with np.load(tmp_path / "bank.npz", allow_pickle=False) as found:
        assert found["images"].dtype == np.uint8
        np.testing.assert_array_equal(found["images"], bank.pixels.permute(0, 2, 3, 1).numpy())
        np.testing.assert_array_equal(found["labels"], bank.soft_labels.argmax(1).numpy())
        np.testing.assert_array_equal(found["soft_labels"], bank.soft_labels.numpy())
        np.testing.assert_array_equal(found["logits"], bank.logits.numpy())
        facts = json.loads(str(found["facts"]))
    assert json.loads(facts["mean"]) == list(bank.input_spec.mean)
    assert len(load_labelled_images(tmp_path / "bank.npz", bank.input_spec, NUM_CLASSES)) == len(bank)


def test_a_folder_for_each_class_holds_the_pixels(tmp_path: Path, bank: SampleBank) -> None:
    write_bank(bank, tmp_path / "bank", "imagefolder")
    assert sorted(each.name for each in (tmp_path / "bank").iterdir() if each.is_dir()) == list("01234")
    with (tmp_path / "bank" / "soft_labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(bank)
    for index, row in enumerate(rows):
        image = torch.tensor(np.array(Image.open(tmp_path / "bank" / row["file"]))).permute(2, 0, 1)
        assert torch.equal(image, bank.pixels[index])
        shares = [float(row[str(number)]) for number in range(NUM_CLASSES)]
        assert shares == pytest.approx(bank.soft_labels[index].tolist(), abs=1e-5)
        assert int(row["file"][0]) == int(bank.soft_labels[index].argmax())


def test_safetensors_hold_everything(tmp_path: Path, bank: SampleBank) -> None:
    write_bank(bank, tmp_path / "bank.safetensors", "safetensors")
    with safe_open(tmp_path / "bank.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("pixels"), bank.pixels)
        assert torch.equal(file.get_tensor("logits"), bank.logits)
        assert torch.equal(file.get_tensor("soft_labels"), bank.soft_labels)
        assert file.metadata()["teacher"] == bank.teacher_hash


@pytest.mark.parametrize("form", ["bank", "npz", "imagefolder", "safetensors"])
def test_what_is_there_is_not_overwritten(tmp_path: Path, bank: SampleBank, form: BankFormat) -> None:
    (tmp_path / "bank").touch()
    with pytest.raises(ConfigError, match="exists already"):
        write_bank(bank, tmp_path / "bank", form)
    assert (tmp_path / "bank").read_bytes() == b""


def test_a_failure_leaves_nothing(tmp_path: Path, bank: SampleBank, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats, "save_tensors", fail)
    with pytest.raises(OSError, match="No space left"):
        write_bank(bank, tmp_path / "bank.safetensors", "safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_a_bank_made_earlier(tmp_path: Path) -> None:
    arguments = ("synthesize", SMALL, *INPUT, "--recipe", "ptq")
    done = qimera(*arguments, "--output", tmp_path / "bank")
    assert done.exit_code == 0, done.stderr
    again = ("--bank", tmp_path / "bank", "--format", "npz", "--output", tmp_path / "bank.npz")
    refused = qimera(*arguments, "--seed", "1", *again)
    assert refused.exit_code == 2
    assert "--bank: its samples are made already, so leave out --recipe, --seed" in said(refused)
    done = qimera("synthesize", SMALL, *INPUT, *again)
    assert done.exit_code == 0, done.stderr
    assert f"bank.npz: 128 synthetic samples and 128 held out of {SMALL}" in done.stdout
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bank", "bank.npz"]
    assert "exists already" in said(qimera(*arguments, "--output", tmp_path / "bank"))


def test_a_file_is_no_bank(tmp_path: Path, teacher: Teacher) -> None:
    (tmp_path / "bank").touch()
    with pytest.raises(ConfigError, match="is this a bank"):
        SampleBank.load(tmp_path / "bank", teacher)
