"""The file of a recording: what goes in comes out; what was altered is refused, what is missing is told."""

from __future__ import annotations

import os
import stat
import struct

import pytest

from splitfl.audit.recording import About, Crossed, End, Origin, Probed, Room, Writer
from splitfl.audit.recording_keys import KEY_FILE, OPEN_KEY_FILE, forget, make_vault, open_vault
from splitfl.errors import DataError, KeyFileError, UsageError
from splitfl.wire.keys import load_keys, new_keys

ABOUT = About(side="party", protocol="split", hidden={"name": "gauss", "sigma": 0.5, "clip": 40.0, "unit": "record"})
FRAMES = [b"a header", os.urandom(4000), b""]
HEADER = 41  # magic, stream, number, salt


@pytest.fixture
def keys(tmp_path):
    return {name: load_keys(new_keys(name, tmp_path / "keys")[1]) for name in ("hospital", "clinic")}


@pytest.fixture
def vault(tmp_path, keys):
    return make_vault(tmp_path / "recording", keys["hospital"])


def message(step, frames=FRAMES, **more):
    sizes = tuple(map(len, frames))
    return Crossed(way="sent", time=1.5, kind="forward", session=7, step=step, sizes=sizes, **more)


def write(vault, number=1, count=3, room=None, closed=True):
    writer = vault.writer("traffic", number, room or Room(10**9))
    writer.write(ABOUT)
    for step in range(1, count + 1):
        writer.write(message(step), FRAMES)
    if closed:
        writer.close()
    else:
        os.close(writer._open)
    return writer.path


def read(vault, number=1):
    reader = vault.reader("traffic", number)
    return list(reader), reader.end


def records_of(path):
    """Header, then each record, as bytes."""
    content = path.read_bytes()
    parts, at = [content[:HEADER]], HEADER
    while at < len(content):
        (length,) = struct.unpack_from(">I", content, at)
        parts.append(content[at : at + 4 + length])
        at += 4 + length
    return parts


def test_what_was_written_is_read(vault):
    write(vault)
    found, end = read(vault)
    assert found == [(ABOUT, ()), *((message(step), tuple(FRAMES)) for step in (1, 2, 3))]
    assert end == End(records=4)


def test_views_of_any_kind_are_kept_as_the_bytes_they_are(vault):
    writer = vault.writer("traffic", 1, Room(10**9))
    frames = [memoryview(bytearray(b"abc")), bytearray(b"de"), b"f"]
    writer.write(message(1, frames), frames)
    writer.close()
    assert read(vault)[0] == [(message(1, frames), (b"abc", b"de", b"f"))]


def test_nothing_of_it_can_be_read_without_the_key(vault):
    path = write(vault)
    assert FRAMES[1][:16] not in path.read_bytes()
    assert b"forward" not in path.read_bytes()
    assert b"gauss" not in path.read_bytes()


def test_the_same_message_twice_gives_other_bytes(vault):
    first, second = (records_of(write(vault, number))[2] for number in (1, 2))
    assert first != second


@pytest.mark.skipif(os.name != "posix", reason="modes")
def test_nobody_else_may_read_it(vault):
    path = write(vault)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((vault.folder / KEY_FILE).stat().st_mode) == 0o600
    assert stat.S_IMODE(vault.folder.stat().st_mode) == 0o700


# ---- altered


@pytest.mark.parametrize("at", [5, 20, 24, 30, HEADER + 4, HEADER + 30, -1])
def test_an_altered_byte_is_refused(vault, at):
    path = write(vault)
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError):
        read(vault)


@pytest.mark.parametrize("order", [(0, 1, 3, 2, 4, 5), (0, 1, 3, 4, 5), (0, 1, 2, 2, 3, 4, 5), (0, 2, 3, 4, 5)])
def test_records_moved_left_out_or_doubled_are_refused(vault, order):
    path = write(vault)
    parts = records_of(path)
    path.write_bytes(b"".join(parts[number] for number in order))
    with pytest.raises(DataError, match="altered"):
        read(vault)


@pytest.mark.parametrize("more", [b"x", b"\0\0\0\x01x"])
def test_bytes_behind_the_last_record_are_refused(vault, more):
    path = write(vault)
    path.write_bytes(path.read_bytes() + more)
    with pytest.raises(DataError, match="behind its last record"):
        read(vault)


def test_a_record_of_another_file_is_refused(vault):
    first, second = write(vault, 1), write(vault, 2)
    parts, foreign = records_of(first), records_of(second)
    first.write_bytes(b"".join([*parts[:2], foreign[2], *parts[3:]]))
    with pytest.raises(DataError, match="altered"):
        read(vault)


def test_a_file_in_the_place_of_another_is_refused(vault):
    first, second = write(vault, 1), write(vault, 2)
    first.write_bytes(second.read_bytes())
    with pytest.raises(DataError, match="part 1"):
        read(vault)


# ---- broken off


@pytest.mark.parametrize("cut", [1, 2, 10, HEADER - 2, "a record", "a record and a half"])
def test_what_was_cut_off_is_told(vault, cut):
    path = write(vault)
    parts = records_of(path)
    if isinstance(cut, int):
        kept, whole = path.read_bytes()[:-cut], 4
    else:
        kept, whole = b"".join(parts[:-2]), 3
        if cut == "a record and a half":
            kept, whole = kept[:-100], 2
    path.write_bytes(kept)
    found, end = read(vault)
    assert end is None
    assert len(found) == whole


@pytest.mark.parametrize("length", [0, 3, 20, HEADER - 1, HEADER])
def test_a_file_that_ends_in_its_header_holds_nothing(vault, length):
    path = write(vault)
    path.write_bytes(path.read_bytes()[:length])
    assert read(vault) == ([], None)


def test_a_killed_process_loses_nothing_that_it_had_written(vault):
    write(vault, closed=False)
    found, end = read(vault)
    assert len(found) == 4
    assert end is None


# ---- the key


def test_another_key_does_not_open_it(vault, keys):
    write(vault)
    assert open_vault(vault.folder, keys["hospital"]).key == vault.key
    with pytest.raises(KeyFileError, match="does not open"):
        open_vault(vault.folder, keys["clinic"])
    with pytest.raises(KeyFileError, match="holder of a key"):
        open_vault(vault.folder, None)


def test_a_later_start_appends_under_the_same_key(vault, keys):
    write(vault, 1)
    again = make_vault(vault.folder, keys["hospital"])
    assert again.key == vault.key
    write(again, max(again.numbers()) + 1)
    assert vault.numbers() == [1, 2]
    with pytest.raises(KeyFileError):
        make_vault(vault.folder, keys["clinic"])


@pytest.mark.parametrize("at", [3, 24, 30, 60, -1])
def test_an_altered_key_file_is_refused(vault, keys, at):
    path = vault.folder / KEY_FILE
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises((KeyFileError, DataError)):
        open_vault(vault.folder, keys["hospital"])


def test_without_keys_a_random_one_lies_beside_it(tmp_path):
    vault = make_vault(tmp_path / "open", None)
    path = vault.folder / OPEN_KEY_FILE
    assert open_vault(vault.folder, None).key == vault.key
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.chmod(0o644)
        with pytest.raises(KeyFileError, match="used by others"):
            open_vault(vault.folder, None)


def test_keys_are_not_shown(vault):
    assert vault.key.hex() not in repr(vault)
    assert repr(vault.key) not in repr(vault)


def test_where_nothing_was_recorded_it_says_so(tmp_path, keys):
    with pytest.raises(UsageError, match="no recording"):
        open_vault(tmp_path / "none", keys["hospital"])


# ---- the limit


def test_it_stops_at_its_limit_says_so_once_and_never_goes_beyond(vault):
    told = []
    room = Room(20_000, vault.size, told.append)
    write(vault, count=50, room=room)
    found, end = read(vault)
    assert 1 < len(found) < 6
    assert end is not None
    assert end.full
    assert len(told) == 1
    assert "20,000" in told[0]
    assert vault.size <= 20_000


def test_a_recording_that_is_full_takes_no_more_at_the_next_start(vault):
    write(vault, count=50, room=Room(20_000, vault.size))
    before = len(read(vault)[0])
    write(vault, 2, count=50, room=Room(20_000, vault.size))
    found, end = read(vault, 2)
    assert before
    assert len(found) <= 2
    assert end is not None
    assert end.full


def test_two_streams_share_one_limit(vault):
    room = Room(20_000, vault.size)
    traffic, truth = (vault.writer(stream, 1, room) for stream in ("traffic", "truth"))
    steps = 0
    while traffic.write(message(steps), FRAMES):
        assert truth.write(Origin(session=7, step=steps, dataset="train", rows=(1, 2), weights=0))
        steps += 1
    assert not truth.write(Probed(session=7, step=steps))
    for writer in (traffic, truth):
        writer.close()
        writer.close()
    assert vault.size <= 20_000
    reader = vault.reader("truth", 1)
    assert len(list(reader)) == steps
    assert reader.end is not None


@pytest.mark.skipif(os.name != "posix" or not hasattr(os, "mkfifo"), reason="needs /dev/full")
def test_a_full_disk_stops_the_recording_and_nothing_else(vault, monkeypatch):
    told = []
    writer = vault.writer("traffic", 1, Room(10**9, on_full=told.append))
    assert writer.write(message(1), FRAMES)
    real, left = os.write, [1000]

    def short_of_room(handle, content):  # a disk with room for some bytes more
        if not left[0]:
            raise OSError(28, "No space left on device")
        took = real(handle, bytes(content[: left[0]]))
        left[0] -= took
        return took

    monkeypatch.setattr(os, "write", short_of_room)
    assert not writer.write(message(2), FRAMES)
    monkeypatch.undo()
    assert not writer.write(message(3), FRAMES)
    writer.close()
    found, end = read(vault)
    assert [head.step for head, _ in found] == [1]
    assert end == End(records=1, full=True)
    assert len(told) == 1
    assert "No space left" in told[0]


# ---- forgetting


def test_forgetting_removes_the_key_and_the_files(vault, keys):
    path = write(vault)
    size, kept = vault.size, path.read_bytes()
    assert forget(vault.folder) == size
    assert not vault.folder.exists()
    vault.folder.mkdir()
    path.write_bytes(kept)  # a copy that somebody made: nobody opens it any more
    with pytest.raises(UsageError, match="destroyed"):
        open_vault(vault.folder, keys["hospital"])
    with pytest.raises(UsageError, match="destroyed"):
        make_vault(vault.folder, keys["hospital"])


def test_the_key_goes_first(vault, keys, monkeypatch):
    path = write(vault)
    gone = []
    real = os.unlink

    def unlink(file, *args, **kwargs):
        gone.append(os.fspath(file))
        if os.fspath(file) == os.fspath(path):
            raise PermissionError(1, "Operation not permitted")
        return real(file, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.setattr("pathlib.Path.unlink", lambda self, missing_ok=False: unlink(self))
    with pytest.raises(PermissionError):
        forget(vault.folder)
    monkeypatch.undo()
    assert gone[0] == os.fspath(vault.folder / KEY_FILE)
    with pytest.raises(UsageError, match="destroyed"):
        open_vault(vault.folder, keys["hospital"])
    forget(vault.folder)
    assert not vault.folder.exists()


def test_the_key_is_overwritten_before_its_name_is_removed(vault):
    path = vault.folder / KEY_FILE
    content = path.read_bytes()
    os.link(path, vault.folder.parent / "held")  # the very block, under another name
    forget(vault.folder)
    overwritten = (vault.folder.parent / "held").read_bytes()
    assert len(overwritten) == len(content)
    assert overwritten[:20] != content[:20]


def test_forgetting_is_safe_where_parts_are_missing(vault, tmp_path):
    assert forget(tmp_path / "never") == 0
    write(vault)
    (vault.folder / KEY_FILE).unlink()
    assert forget(vault.folder) > 0
    assert forget(vault.folder) == 0


def test_forgetting_leaves_other_files_alone(vault):
    write(vault)
    (vault.folder / "notes.txt").write_text("mine", encoding="utf-8")
    forget(vault.folder)
    assert [path.name for path in vault.folder.iterdir()] == ["notes.txt"]


def test_a_link_in_the_place_of_the_key_does_not_destroy_what_it_points_to(vault, tmp_path):
    other = tmp_path / "precious"
    other.write_text("precious", encoding="utf-8")
    (vault.folder / KEY_FILE).unlink()
    (vault.folder / KEY_FILE).symlink_to(other)
    forget(vault.folder)
    assert other.read_text(encoding="utf-8") == "precious"


def test_a_writer_never_writes_over_a_file(vault):
    path = write(vault)
    with pytest.raises(FileExistsError):
        Writer(path, vault.key, stream="traffic", number=1, room=Room(10**9))
