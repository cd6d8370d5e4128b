"""Files that are not there are named before torch, which takes seconds, is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

_CODE = """
import sys
from pet_finetune.cli import main
status = main(sys.argv[1:])
assert "torch" not in sys.modules, "torch was imported"
sys.exit(status)
"""
_OPTIONS = """
architecture: {name: pet, training: {num_epochs: 1}}
training_set: {systems: nowhere.xyz, targets: {energy: {}}}
validation_set: 0.1
test_set: 0.0
"""


#: An address where nobody answers.
_NOBODY = "http://127.0.0.1:9/model.ckpt"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train options.yaml", "data file 'nowhere.xyz' does not exist"),
        ("train here.yaml -c nowhere.ckpt", "nowhere.ckpt: no such checkpoint"),
        ("eval nowhere.ckpt here.xyz", "nowhere.ckpt: no such checkpoint"),
        ("eval here.ckpt heer.xyz", "Did you mean 'here.xyz'"),
        ("eval options.yaml -c here.ckpt", "'nowhere.xyz' does not exist"),
        ("inspect nowhere.xyz", "'nowhere.xyz' does not exist"),
        ("inspect here.xyz -c nowhere.ckpt", "nowhere.ckpt: no such checkpoint"),
        ("inspect options.yaml", "'nowhere.xyz' does not exist"),
        ("md nowhere.ckpt here.xyz", "nowhere.ckpt: no such checkpoint"),
        ("md here.ckpt nowhere.xyz", "'nowhere.xyz' does not exist"),
        ("info nowhere.ckpt", "nowhere.ckpt: no such checkpoint"),
        ("export nowhere.ckpt", "nowhere.ckpt: no such checkpoint"),
        ("export here.ckpt --adapter nowhere", "There is no adapter in 'nowhere'"),
        ("eval here.ckpt here.xyz --adapter nowhere", "There is no adapter in 'nowhere'"),
        ("md here.ckpt here.xyz --adapter nowhere", "There is no adapter in 'nowhere'"),
        ("md --restart nowhere", "there is no folder 'nowhere'"),
        ("train options.yaml --restart nowhere", "there is no file 'nowhere'"),
        ("relax nowhere.ckpt here.xyz -o out.xyz", "nowhere.ckpt: no such checkpoint"),
        ("relax here.ckpt nowhere.xyz -o out.xyz", "'nowhere.xyz' does not exist"),
        ("pretrain nowhere.xyz -c here.ckpt -o out.ckpt", "'nowhere.xyz' does not exist"),
        ("pretrain here.xyz -c nowhere.ckpt -o out.ckpt", "nowhere.ckpt: no such checkpoint"),
        ("adapter info nowhere", "There is no adapter in 'nowhere'"),
        ("adapter merge nowhere -c here.ckpt -o out.ckpt", "There is no adapter in 'nowhere'"),
        ("adapter check nowhere -c nowhere.ckpt", "nowhere.ckpt: no such checkpoint"),
        ("report nowhere", "There is no folder 'nowhere'"),
        ("convert nowhere.xyz out", "'nowhere.xyz' does not exist"),
        ("watch nowhere", "there is no folder 'nowhere'"),
        (f"train here.yaml -c {_NOBODY}", "cannot be fetched from 127.0.0.1:9"),
        (
            f"train here.yaml -r architecture.training.finetune.read_from={_NOBODY}",
            "cannot be fetched from 127.0.0.1:9",
        ),
        (f"eval {_NOBODY} here.xyz", "cannot be fetched from 127.0.0.1:9"),
        (f"eval here.yaml -c {_NOBODY}", "cannot be fetched from 127.0.0.1:9"),
        (f"inspect here.xyz -c {_NOBODY}", "cannot be fetched from 127.0.0.1:9"),
        (f"md {_NOBODY} here.xyz", "cannot be fetched from 127.0.0.1:9"),
        (f"info {_NOBODY}", "cannot be fetched from 127.0.0.1:9"),
        (f"export {_NOBODY}", "cannot be fetched from 127.0.0.1:9"),
        (f"pretrain here.xyz -c {_NOBODY} -o new.ckpt", "cannot be fetched from 127.0.0.1:9"),
        (f"adapter check here -c {_NOBODY}", "cannot be fetched from 127.0.0.1:9"),
        (f"adapter merge here -c {_NOBODY} -o new", "cannot be fetched from 127.0.0.1:9"),
    ],
)
def test_a_misspelt_path_costs_no_import_of_torch(tmp_path, arguments, words):
    for name in ("here.xyz", "here.ckpt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "options.yaml").write_text(_OPTIONS)
    (tmp_path / "here.yaml").write_text(_OPTIONS.replace("nowhere", "here"))
    done = subprocess.run(
        [sys.executable, "-c", _CODE, *arguments.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert words in done.stderr
    assert "torch was imported" not in done.stderr
    assert done.returncode == 1
