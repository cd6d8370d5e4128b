"""Conversion: nothing is lost, metatrain reads it, and stopping it or doing it twice is no harm."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import sys
import types
import zipfile
import zlib

import ase.db
import ase.io
import numpy as np
import pytest
import torch
from ase.io.jsonio import encode

from pet_finetune.config.load import parse_options
from pet_finetune.data import frame_blocks, metatrain_sets, packing, process_pool
from pet_finetune.data.convert_sets import convert
from pet_finetune.data.frame_files import forget_files, read_frames
from pet_finetune.data.label_columns import find_value
from pet_finetune.data.metatrain_sets import ABOUT, Folder
from pet_finetune.data.neighbors import edge_vectors, structure_neighbors
from pet_finetune.data.readers import read_structures
from pet_finetune.data.structure import atoms_to_structure
from pet_finetune.data.structure_sets import OnDisk
from pet_finetune.errors import DataError
from tiny_data import crystals, data_section, molecules, write_folder, write_frames


@pytest.fixture(autouse=True)
def _forget(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    forget_files()


def assert_holds(folder, frames):
    """The folder has the frames with their labels; energies to the last digit."""
    found = Folder(folder)
    assert len(found) == len(frames)
    for one, frame in zip(found, frames, strict=True):
        assert one.numbers.tolist() == frame.numbers.tolist()
        assert one.pbc.tolist() == frame.pbc.tolist()
        np.testing.assert_allclose(one.positions, frame.positions, atol=1e-5)
        results = frame.calc.results
        if "energy" in results:
            assert one.info["energy"] == results["energy"]
        if "forces" in results:
            np.testing.assert_allclose(one.arrays["forces"], results["forces"], atol=1e-5)
        if "stress" in results:
            np.testing.assert_allclose(one.info["stress"], frame.get_stress(voigt=False), atol=1e-6)


FRAMES = [*molecules(4), *crystals(3)]


@pytest.fixture
def data(tmp_path):
    """Molecules, then crystals, in a file that holds all digits."""
    path = tmp_path / "data.db"
    with ase.db.connect(path) as rows:
        for frame in FRAMES:
            rows.write(frame)
    return path


def test_nothing_is_lost(tmp_path, data):
    done = convert(data, tmp_path / "set")
    assert (done.structures, done.made) == (7, True)
    assert {"energy", "forces", "stress"} <= set(done.labels)
    assert_holds(tmp_path / "set", FRAMES)
    names = {path.name for path in tmp_path.iterdir()}
    assert not {"set.part", "set.lock"} & names
    # A molecule has no stress.
    structures = read_structures(dataset(tmp_path / "set"))
    assert [("energy/stress" in s.labels) for s in structures] == [False] * 4 + [True] * 3


def dataset(path, **section):
    raw = {"training_set": {**data_section(str(path)), **section}}
    return parse_options(raw, require_start=False).options.training_set[0]


def test_metatrain_reads_the_folder(tmp_path, data):
    found = pytest.importorskip("metatrain.utils.data.dataset")
    convert(data, tmp_path / "set")
    target = {
        "key": "energy", "quantity": "energy", "sample_kind": "system", "num_subtargets": 1,
        "type": "scalar", "forces": {"key": "forces"}, "stress": {"key": "stress"},
        "virial": False, "unit": "eV", "description": "", "per_atom": False,
    }  # fmt: skip
    read = found.MemmapDataset(tmp_path / "set", {"energy": target})
    assert len(read) == 7
    sample = read[5]
    assert sample.system.types.tolist() == FRAMES[5].numbers.tolist()
    block = sample.energy.block()
    assert float(block.values) == pytest.approx(FRAMES[5].calc.results["energy"], rel=1e-6)
    forces = -block.gradient("positions").values[..., 0].numpy()
    np.testing.assert_allclose(forces, FRAMES[5].calc.results["forces"], atol=1e-5)


def test_metatrain_reads_the_zip(tmp_path, data):
    found = pytest.importorskip("metatrain.utils.data.dataset")
    done = convert(data, tmp_path / "set.zip")
    assert (done.structures, done.made) == (7, True)
    assert not convert(data, tmp_path / "set.zip").made
    read = found.DiskDataset(tmp_path / "set.zip")
    assert len(read) == 7
    sample = read[5]
    block = sample["energy"].block() if isinstance(sample, dict) else sample.energy.block()
    assert float(block.values) == FRAMES[5].calc.results["energy"]
    for one, frame in zip(read_frames(tmp_path / "set.zip"), FRAMES, strict=True):
        assert one.info["energy"] == frame.calc.results["energy"]
        np.testing.assert_allclose(one.arrays["forces"], frame.calc.results["forces"], atol=1e-5)
    assert {path.name for path in tmp_path.iterdir() if "set.zip" in path.name} == {"set.zip"}


def test_xyz_is_read_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(frame_blocks, "_TEXT", 700)  # a frame or two
    path = write_frames(tmp_path / "data.xyz", FRAMES)
    convert(path, tmp_path / "set")
    for one, frame in zip(Folder(tmp_path / "set"), read_frames(path), strict=True):
        assert one.info["energy"] == find_value(frame, "energy")
        np.testing.assert_allclose(one.positions, frame.positions, atol=1e-5)
    assert len(Folder(tmp_path / "set")) == 7


@pytest.mark.parametrize("together", [200, 1 << 20])
def test_a_frame_that_is_cut_off_is_named(tmp_path, monkeypatch, together):
    monkeypatch.setattr(frame_blocks, "_TEXT", together)
    path = write_frames(tmp_path / "data.xyz", molecules(5, names=("CH4",)))
    text = path.read_text().splitlines(keepends=True)
    path.write_text("".join(text[:-2]))
    with pytest.raises(DataError, match="the last frame, 4, which begins on line 29, is cut off"):
        convert(path, tmp_path / "set")
    assert not (tmp_path / "set").exists()


class Stopped(BaseException):
    """As Ctrl-C."""


def stop(*ignored):
    raise Stopped


def stopped(source, target, where):
    """A conversion that is stopped where it calls a function of ``packing``."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packing, where, stop)
        with pytest.raises(Stopped):
            convert(source, target)


@pytest.mark.parametrize("kind", ["xyz", "db", "folder", "zip"])
def test_what_was_stopped_goes_on(tmp_path, monkeypatch, data, kind):
    source = data
    if kind == "xyz":
        monkeypatch.setattr(frame_blocks, "_TEXT", 700)
        source = write_frames(tmp_path / "data.xyz", FRAMES)
    elif kind != "db":
        source = tmp_path / ("source.zip" if kind == "zip" else "source")
        convert(data, source)
    convert(source, tmp_path / "whole")
    monkeypatch.setattr(packing, "_SECONDS", -1.0)
    add, calls = packing._Writer.add, []

    def counted(self, atoms):
        calls.append(self.count)
        if len(calls) == 6:
            add(self, atoms)  # written, and not in the record
            raise Stopped
        add(self, atoms)

    monkeypatch.setattr(packing._Writer, "add", counted)
    with pytest.raises(Stopped):
        convert(source, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    assert convert(source, tmp_path / "set").made
    assert calls == [0, 1, 2, 3, 4, 5, 5, 6]
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "set" / file.name).read_bytes(), file.name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["xyz", "db", "folder", "zip"])
def test_several_processes_write_what_one_writes(tmp_path, monkeypatch, caplog, data, kind):
    caplog.set_level("INFO")
    monkeypatch.setattr(frame_blocks, "_TEXT", 700)
    monkeypatch.setattr(frame_blocks, "_TOGETHER", 2)
    source = write_frames(tmp_path / "data.xyz", FRAMES) if kind == "xyz" else data
    if kind == "folder":
        source = write_folder(tmp_path / "old", molecules(25))
    if kind == "xyz":  # notices of blocks are told of the whole, and what processes log is logged
        source.write_bytes(source.read_bytes().replace(b"energy=", b"note=\xe5 dump=1 energy="))
    ending = ".zip" if kind == "zip" else ""
    found = []
    for workers in (1, 2):
        caplog.clear()
        target = tmp_path / f"set{workers}{ending}"
        convert(source, target, workers=workers)
        files = [target] if ending else sorted(target.iterdir())
        content = {file.name.strip("12"): file.read_bytes() for file in files}
        if ending:
            with zipfile.ZipFile(target) as archive:
                content = {name: archive.read(name) for name in archive.namelist()}
        # Where processes start slowly, progress is told too.
        records = [r for r in caplog.records if r.filename != "terminal.py"]
        found.append((content, [r.getMessage().replace(str(target), "") for r in records]))
    assert found[0] == found[1]
    assert kind != "xyz" or any("not UTF-8" in message for message in found[0][1])


@pytest.mark.slow
def test_errors_and_the_end_of_a_process_of_several(tmp_path, monkeypatch):
    monkeypatch.setattr(frame_blocks, "_TEXT", 200)
    path = write_frames(tmp_path / "data.xyz", molecules(5, names=("CH4",)))
    text = path.read_text().splitlines(keepends=True)
    path.write_text("".join(text[:-2]))
    with pytest.raises(DataError, match="the last frame, 4, which begins on line 29, is cut off"):
        convert(path, tmp_path / "set", workers=2)
    with pytest.raises(DataError, match="was killed"):
        list(process_pool.in_order(os._exit, [3], 2))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("record", [None, "{}"])
def test_a_record_that_says_more_than_there_is_begins_anew(tmp_path, data, record):
    """As after the machine went down: the record is on the disk, and not all that it counts."""
    convert(data, tmp_path / "whole")
    stopped(data, tmp_path / "set", "_tidy")
    (tmp_path / "set").rename(tmp_path / "set.part")
    if record is None:
        os.truncate(tmp_path / "set.part" / "x.bin", 12)
    else:  # or it is of another version
        (tmp_path / "set.part" / packing._PROGRESS).write_text(record)
    convert(data, tmp_path / "set")
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "set" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("last", ["_as_npy", "_tidy"])
def test_what_was_stopped_at_its_end_is_finished(tmp_path, monkeypatch, data, last):
    convert(data, tmp_path / "whole")
    stopped(data, tmp_path / "set", last)
    monkeypatch.setattr(packing._Writer, "add", None)  # nothing is done again
    assert convert(data, tmp_path / "set").structures == 7
    names = {file.name for file in (tmp_path / "set").iterdir()}
    assert names == {file.name for file in (tmp_path / "whole").iterdir()}
    assert_holds(tmp_path / "set", FRAMES)


def test_another_content_of_the_same_size_is_another_set(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_PIECES", 2)
    monkeypatch.setattr(packing, "_PIECE", 64)
    path = write_frames(tmp_path / "data.xyz", FRAMES)
    before = packing.identity_of(path), packing.identity_of(path, whole=True)
    text = path.read_bytes()
    middle = len(text) // 2
    path.write_bytes(text[:middle] + b"#" + text[middle + 1 :])
    assert packing.identity_of(path) == before[0]
    assert packing.identity_of(path, whole=True) != before[1]


def test_another_content_begins_anew_and_replaces_nothing(tmp_path, data):
    convert(data, tmp_path / "set")
    before = (tmp_path / "set" / "x.bin").read_bytes()
    assert not convert(data, tmp_path / "set").made
    with pytest.raises(DataError, match="holds something else"):
        convert(data, tmp_path / "set", labels=["energy"])
    other = write_frames(tmp_path / "other.xyz", molecules(2))
    with pytest.raises(DataError, match="holds something else"):
        convert(other, tmp_path / "set")
    assert (tmp_path / "set" / "x.bin").read_bytes() == before


def test_chosen_labels_alone_are_kept(tmp_path, data):
    assert set(convert(data, tmp_path / "set", labels=["energy"]).labels) == {"energy"}


def test_a_label_that_no_frame_has_is_told_of(tmp_path, data, caplog):
    convert(data, tmp_path / "set", labels=["energy", "nergy"])
    assert "has nergy as numbers" in caplog.text


@pytest.mark.parametrize("harm", ['{"labels": {"energy": {}}', '{"labels": 3', '{"notes": [1]'])
def test_a_damaged_description_is_told(tmp_path, data, harm):
    convert(data, tmp_path / "set")
    about = tmp_path / "set" / ABOUT
    about.write_text(harm + ', "version": 1}')
    with pytest.raises(DataError, match="is damaged"):
        Folder(tmp_path / "set")


def test_a_set_of_another_version_is_refused(tmp_path, data):
    convert(data, tmp_path / "set")
    about = tmp_path / "set" / ABOUT
    about.write_text(about.read_text().replace('"version": 1', '"version": 0'))
    with pytest.raises(DataError, match="written by another version .* Convert the data again"):
        read_frames(tmp_path / "set")


def test_labels_that_come_later_or_change_their_shape(tmp_path, caplog):
    frames = molecules(4)
    frames[2].info["dipole"] = np.array([1.0, 2.0, 3.0])
    frames[1].info["mixed"], frames[3].info["mixed"] = 1.0, np.zeros(4)
    frames[0].info["name"] = "text"
    frames[0].info["energy-unit"] = frames[3].info["energy-unit"] = "kcal/mol"
    path = write_frames(tmp_path / "data.xyz", frames)
    convert(path, tmp_path / "set")
    assert "'mixed' is left out" in caplog.text
    found = Folder(tmp_path / "set")
    assert ["dipole" in frame.info for frame in found] == [False, False, True, False]
    assert found[2].info["dipole"].tolist() == [1.0, 2.0, 3.0]
    assert "mixed" not in found.labels
    assert found[1].info["energy-unit"] == "kcal/mol"


@pytest.mark.parametrize("broken", [0, 3])
def test_text_in_place_of_a_number_is_told_once(tmp_path, caplog, broken):
    frames = molecules(4)
    for number, atoms in enumerate(frames):
        atoms.info["total"] = "*****" if number == broken else 1.0
        atoms.info["note"] = "text"
    convert(write_frames(tmp_path / "data.xyz", frames), tmp_path / "set")
    told = [record.getMessage() for record in caplog.records if "is text there" in record.msg]
    assert told == [
        f"frame {broken} of {tmp_path / 'data.xyz'} ('*****'): 'total' is text there and a number "
        "in other frames: it counts as unknown"
    ]
    found = Folder(tmp_path / "set")
    assert [frame.info.get("total") for frame in found].count(1.0) == 3


def test_slabs_keep_their_periodic_directions(tmp_path):
    frames = crystals(2)
    frames[1].pbc = (True, True, False)
    convert(write_frames(tmp_path / "data.xyz", frames), tmp_path / "set")
    assert [frame.pbc.tolist() for frame in Folder(tmp_path / "set")] == [
        [True] * 3, [True, True, False]
    ]  # fmt: skip


def _convert(source, target):
    convert(source, target)


def test_two_processes_at_once_make_one(tmp_path, data):
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_convert, args=(data, tmp_path / "set")) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert_holds(tmp_path / "set", FRAMES)


def test_a_large_database_is_packed_once_and_stays_on_disk(tmp_path, monkeypatch, data):
    monkeypatch.setattr(metatrain_sets, "MOST_IN_MEMORY", 3)
    structures = read_structures(dataset(data))
    assert isinstance(structures, OnDisk)
    assert structures[0].source == str(data)
    energies = [float(s.labels["energy"]) for s in structures]
    assert energies == [frame.calc.results["energy"] for frame in FRAMES]
    forget_files()
    monkeypatch.setattr(packing, "_pack", None)  # is not made again
    assert len(read_structures(dataset(data))) == 7


def test_a_large_zip_is_packed_once(tmp_path, monkeypatch, data):
    convert(data, tmp_path / "set.zip")
    monkeypatch.setattr(metatrain_sets, "MOST_IN_MEMORY", 3)
    structures = read_structures(dataset(tmp_path / "set.zip"))
    assert isinstance(structures, OnDisk)
    assert len(structures) == 7
    assert float(structures[6].labels["energy"]) == FRAMES[6].calc.results["energy"]


def test_a_database_that_is_cut_off_is_named(tmp_path, data):
    data.write_bytes(data.read_bytes()[:-4096])
    with pytest.raises(DataError, match=r"data.db .*(cut off|cannot be read)"):
        convert(data, tmp_path / "set")


def test_a_folder_converts_to_a_zip(tmp_path):
    folder = write_folder(tmp_path / "old", molecules(3))
    convert(folder, tmp_path / "set.zip")
    for one, other in zip(read_frames(tmp_path / "set.zip"), Folder(folder), strict=True):
        np.testing.assert_array_equal(one.arrays["forces"], other.arrays["forces"])


def test_neighbour_lists_are_stored_for_a_cutoff(tmp_path, data, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(metatrain_sets, "MOST_IN_MEMORY", 3)
    assert convert(data, tmp_path / "set", neighbors=3.0).made
    structures = read_structures(dataset(tmp_path / "set"))
    assert isinstance(structures, OnDisk)
    for cutoff in (3.0, 2.5):  # of the second there are none
        for index, structure in enumerate(structures):
            _, found = structures.with_neighbors(index, cutoff)
            for ours, theirs in zip(found, structure_neighbors(structure, cutoff), strict=True):
                assert torch.equal(ours, theirs)
    assert caplog.text.count("they are computed") == 1
    one = structures.stores[0].neighbors(6, 3.0)
    assert one is not None
    assert one.num_edges > 0
    assert structures.stores[0].neighbors(6, 2.5) is None
    with pytest.raises(DataError, match="holds something else"):
        convert(data, tmp_path / "set")
    with pytest.raises(DataError, match="a cutoff above 0, not -1"):
        convert(data, tmp_path / "new", neighbors=-1.0)
    os.truncate(tmp_path / "set" / "pairs.i4", 24)
    with pytest.raises(DataError, match=r"pairs.i4 is cut off"):
        Folder(tmp_path / "set")


def test_neighbour_lists_in_a_zip_are_those_of_metatrain(tmp_path, data):
    found = pytest.importorskip("metatrain.utils.data.dataset")
    convert(data, tmp_path / "set.zip", neighbors=3.0)
    system = found.DiskDataset(tmp_path / "set.zip")[5].system
    (options,) = system.known_neighbor_lists()
    assert (options.cutoff, options.full_list, options.strict) == (3.0, True, True)
    block = system.get_neighbor_list(options)
    structure = atoms_to_structure(FRAMES[5])
    pairs = structure_neighbors(structure, 3.0)
    columns = [pairs.centers[:, None], pairs.neighbors[:, None], pairs.shifts]
    assert torch.equal(block.samples.values, torch.cat(columns, dim=1).int())
    vectors = edge_vectors(structure.positions, structure.cell, pairs).unsqueeze(-1)
    torch.testing.assert_close(block.values, vectors, atol=1e-5, rtol=0)


class _FakeLmdb(types.ModuleType):
    """As much of the library as reading takes."""

    Error = sqlite3.Error

    def __init__(self, content):
        super().__init__("lmdb")
        self.content, self.pages = content, 1

    def open(self, path, **ignored):
        return self

    def begin(self):
        return self

    def info(self):
        return {"last_pgno": self.pages - 1}

    def stat(self):
        return {"psize": 1}

    def get(self, key):
        return self.content.get(key.decode())

    def abort(self):
        pass

    close = abort


def _packed(value):
    return zlib.compress(encode(value).encode())


@pytest.fixture
def aselmdb(tmp_path, monkeypatch):
    """Frames as ASE's LMDB has them, one of which was deleted."""
    content = {"nextid": _packed(len(FRAMES) + 2), "deleted_ids": _packed([3])}
    for number, frame in zip([1, 2, 4, 5, 6, 7, 8], FRAMES, strict=True):
        results = {k: np.asarray(v).tolist() for k, v in frame.calc.results.items()}
        row = {"numbers": frame.numbers, "positions": frame.positions, "cell": frame.cell.array,
               "pbc": frame.pbc, "data": {"source": "here"}, "calculator": "unknown",
               "calculator_parameters": {}, **results}  # fmt: skip
        content[str(number)] = _packed(row)
    fake = _FakeLmdb(content)
    monkeypatch.setitem(sys.modules, "lmdb", fake)
    monkeypatch.setattr("pet_finetune.data.ase_databases.missing_extra", lambda *names: None)
    path = tmp_path / "data.aselmdb"
    path.write_bytes(b"what the library reads")
    return path, fake


def test_lmdb_of_ase_is_read_and_converted(tmp_path, aselmdb):
    path, _ = aselmdb
    assert len(read_frames(path)) == 7
    convert(path, tmp_path / "set")
    assert_holds(tmp_path / "set", FRAMES)


def test_lmdb_whose_last_row_is_cut_off_is_named(tmp_path, aselmdb):
    path, fake = aselmdb
    fake.content["8"] = fake.content["8"][:40]
    with pytest.raises(DataError, match="row 8 is missing"):
        convert(path, tmp_path / "set")


def test_lmdb_that_is_cut_off_is_told(tmp_path, aselmdb):
    path, fake = aselmdb
    fake.pages = 4096
    with pytest.raises(DataError, match="cut off: it has 22 bytes of the 4096"):
        read_frames(path)


def test_lmdb_of_pickles_is_refused(tmp_path, aselmdb):
    path, fake = aselmdb
    del fake.content["nextid"]
    with pytest.raises(DataError, match="pickles"):
        read_frames(path)


def test_a_missing_library_is_told_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("pet_finetune.installation.find_spec", lambda name: None)
    path = tmp_path / "data.aselmdb"
    path.write_bytes(b"something")
    with pytest.raises(DataError, match=r"needs the library lmdb.*pet-finetune\[lmdb\]"):
        read_frames(path)


@pytest.mark.parametrize("name", ["new.xyz", "there", "set.DB"])
def test_an_output_that_is_no_set_is_refused_in_words(tmp_path, name):
    write_frames(tmp_path / "a.xyz", molecules(1))
    (tmp_path / "there").write_text("mine")
    with pytest.raises(DataError, match=r"to be a folder, or a file that ends with \.zip"):
        convert(tmp_path / "a.xyz", tmp_path / name)
    assert (tmp_path / "there").read_text() == "mine"
