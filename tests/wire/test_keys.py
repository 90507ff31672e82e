import base64
import contextlib
import hashlib
import os
import stat

import hypothesis.strategies as st
import pytest
import zmq.auth
from hypothesis import given, settings
from zmq.utils import z85

from splitfl.aggregation.identity import load_identities, signing_key
from splitfl.cli import main
from splitfl.errors import KeyFileError, UsageError
from splitfl.wire.keys import (
    AllowList,
    check_name,
    find_signing,
    fingerprint,
    load_keys,
    load_public,
    load_signing,
    new_keys,
    renew_public,
    z85_decode,
)
from splitfl.wire.signing import signing_fingerprint


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def made(tmp_path):
    """Paths of the public and the secret file of a new pair called `hospital`."""
    return new_keys("hospital", tmp_path / "keys")


# ---- one pair


def test_a_new_pair_is_readable_here_and_by_zeromq(made):
    public, secret = made
    assert (public.name, secret.name) == ("hospital.key", "hospital.key_secret")
    keys = load_keys(secret)
    assert zmq.auth.load_certificate(secret) == (keys.public, keys.secret)
    assert zmq.auth.load_certificate(public) == (keys.public, None)
    assert load_public(public) == load_public(secret) == keys.public
    assert zmq.curve_public(keys.secret) == keys.public


def test_zeromqs_own_certificates_are_readable_here(tmp_path):
    public, secret = zmq.auth.create_certificates(tmp_path, "theirs")
    os.chmod(secret, 0o600)
    keys = load_keys(tmp_path / "theirs.key_secret")
    assert (keys.public, keys.secret) == zmq.auth.load_certificate(secret)
    assert load_public(tmp_path / "theirs.key") == zmq.auth.load_certificate(public)[0]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_modes_do_not_depend_on_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        public, secret = new_keys("a", tmp_path / "keys")
    finally:
        os.umask(before)
    assert mode_of(secret) & 0o077 == 0
    assert mode_of(tmp_path / "keys") & 0o077 == 0
    assert mode_of(public) & 0o022 == 0
    if umask == 0o022:
        assert mode_of(secret) == 0o600
        assert mode_of(tmp_path / "keys") == 0o700


def test_the_secret_file_has_its_mode_before_it_has_content(tmp_path, monkeypatch):
    modes = []
    opened = os.open

    def watch(path, flags, mode=0o777):
        handle = opened(path, flags, mode)
        modes.append((str(path).rsplit("/", 1)[1], stat.S_IMODE(os.fstat(handle).st_mode), flags & os.O_EXCL))
        return handle

    monkeypatch.setattr(os, "open", watch)
    before = os.umask(0)
    try:
        new_keys("a", tmp_path)
    finally:
        os.umask(before)
    secret = [entry for entry in modes if "key_secret" in entry[0]]
    assert [(mode, bool(exclusive)) for _, mode, exclusive in secret] == [(0o600, True)]


def test_an_existing_pair_is_not_overwritten_unless_forced(made, tmp_path):
    public, secret = made
    before = secret.read_bytes()
    with pytest.raises(KeyFileError):
        new_keys("hospital", tmp_path / "keys")
    secret.unlink()
    with pytest.raises(KeyFileError):
        new_keys("hospital", tmp_path / "keys")  # the public file alone is enough
    new_keys("hospital", tmp_path / "keys", force=True)
    assert secret.read_bytes() != before
    assert load_public(public) == load_keys(secret).public
    assert sorted(path.name for path in (tmp_path / "keys").iterdir()) == ["hospital.key", "hospital.key_secret"]


def test_nothing_half_written_is_left_when_the_disk_is_full(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeyFileError, match="No space left"):
        new_keys("a", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o666, 0o710])
def test_a_secret_that_others_can_use_is_refused_with_the_remedy(made, mode):
    _, secret = made
    secret.chmod(mode)
    with pytest.raises(KeyFileError) as caught:
        load_keys(secret)
    assert f"chmod 600 {secret}" in str(caught.value)
    secret.chmod(0o400)
    load_keys(secret)


def test_a_public_file_is_no_secret_one(made):
    public, _ = made
    public.chmod(0o600)
    with pytest.raises(KeyFileError, match="only a public key") as caught:
        load_keys(public)
    assert "hospital.key_secret" in str(caught.value)


def test_a_missing_file_says_how_to_make_one(tmp_path):
    for load in (load_keys, load_public):
        with pytest.raises(KeyFileError) as caught:
            load(tmp_path / "none.key_secret")
        assert "splitfl keys new" in str(caught.value)


GOOD = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
MALFORMED = {
    "empty": "",
    "no key": "metadata\ncurve\n",
    "too short": f'    public-key = "{GOOD[:-1]}"\n',
    "too long": f'    public-key = "{GOOD}0"\n',
    "not z85": f'    public-key = "{GOOD[:-1]} "\n',
    "beyond 32 bits": f'    public-key = "{"#" * 40}"\n',
    "not ascii": f'    public-key = "{GOOD[:-1]}\u00e9"\n',
    "commented out": f'#    public-key = "{GOOD}"\n',
    "a bad secret": f'    public-key = "{GOOD}"\n    secret-key = "short"\n',
    "binary": "\x00\x01\x02",
    "enormous": f'    public-key = "{GOOD}"\n' + "#" * 20_000,
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused_without_showing_them(tmp_path, name):
    path = tmp_path / "a.key"
    path.write_text(MALFORMED[name], encoding="utf-8")
    path.chmod(0o600)
    for load in (load_keys, load_public):
        with pytest.raises(KeyFileError) as caught:
            load(path)
        assert GOOD[:10] not in str(caught.value)
        assert str(path) in str(caught.value)


def test_a_folder_is_no_key_file(tmp_path):
    with pytest.raises(KeyFileError):
        load_public(tmp_path)


def test_printing_keys_does_not_show_the_secret(made):
    keys = load_keys(made[1])
    assert keys.secret.decode() not in repr(keys)
    assert keys.secret.decode() not in str(keys)


@settings(max_examples=100)
@given(st.binary(min_size=32, max_size=32))
def test_z85_agrees_with_pyzmq(raw):
    assert z85_decode(z85.encode(raw)) == raw


@settings(max_examples=200)
@given(st.one_of(st.binary(max_size=60), st.binary(min_size=40, max_size=40)))
def test_z85_of_anything_is_bytes_or_an_error(text):
    with contextlib.suppress(KeyFileError):
        assert len(z85_decode(text)) == 32


def test_a_fingerprint_is_the_hash_of_the_key_in_groups():
    shown = fingerprint(GOOD.encode())
    assert shown.startswith("SHA256:")
    groups = shown.removeprefix("SHA256:").split("-")
    assert [len(group) for group in groups] == [4] * 8
    digest = hashlib.sha256(z85.decode(GOOD.encode())).digest()
    assert base64.b32decode("".join(groups)) == digest[:20]


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a", "a/b", "a\\b", ".hidden", "-rf", "a b", "a\n", "a\0", "\u00e9", "x" * 65, "a:b", "*"],
)
def test_names_cannot_leave_the_folder(tmp_path, name):
    with pytest.raises(UsageError):
        check_name(name)
    with pytest.raises(UsageError):
        new_keys(name, tmp_path)
    with pytest.raises(UsageError):
        AllowList(tmp_path).revoke(name)
    assert list(tmp_path.iterdir()) == []


def test_ordinary_names_are_fine():
    for name in ("hospital", "Clinic-2", "ward_3.north", "7", "x" * 64):
        assert check_name(name) == name


# ---- the allow-list


@pytest.fixture
def parties(tmp_path):
    """An allow-list with `a` on it; the keys of `a` and `b` beside it."""
    for name in ("a", "b"):
        new_keys(name, tmp_path / "keys")
    allow = AllowList(tmp_path / "parties")
    allow.add(tmp_path / "keys" / "a.key")
    return allow


def key(parties, name):
    return load_public(parties.folder.parent / "keys" / f"{name}.key")


def test_who_is_on_the_list_is_admitted(parties):
    assert parties.names() == ["a"]
    assert parties.allowed(key(parties, "a")) == "a"
    assert parties.allowed(key(parties, "b")) is None
    assert parties.allowed(b"") is None
    assert mode_of(parties.folder) == 0o700


def test_another_process_may_change_the_list(parties):
    elsewhere = AllowList(parties.folder)
    elsewhere.add(parties.folder.parent / "keys" / "b.key")
    assert parties.allowed(key(parties, "b")) == "b"
    elsewhere.revoke("a")
    assert parties.allowed(key(parties, "a")) is None
    assert parties.names() == ["b"]


def test_a_file_replaced_in_place_is_noticed(parties):
    """Same name, same size: only the inode or the time tells."""
    target = parties.folder / "a.key"
    new = parties.folder.parent / "keys" / "b.key"
    assert new.stat().st_size == target.stat().st_size
    copy = parties.folder / "copy"
    copy.write_bytes(new.read_bytes())
    os.utime(copy, ns=(target.stat().st_atime_ns, target.stat().st_mtime_ns))
    os.replace(copy, target)
    assert parties.allowed(key(parties, "a")) is None
    assert parties.allowed(key(parties, "b")) == "a"


def test_an_unchanged_folder_is_not_read_again(parties, monkeypatch):
    assert parties.allowed(key(parties, "a")) == "a"
    monkeypatch.setattr(AllowList, "reload", lambda self: pytest.fail("read again"))
    assert parties.allowed(key(parties, "a")) == "a"


def test_a_missing_folder_admits_nobody(tmp_path, parties):
    assert AllowList(tmp_path / "nowhere").names() == []
    for path in parties.folder.iterdir():
        path.unlink()
    parties.folder.rmdir()
    assert parties.allowed(key(parties, "a")) is None


def test_files_that_cannot_be_used_are_named_and_harm_nobody(parties):
    keys = parties.folder.parent / "keys"
    (parties.folder / "broken.key").write_text("nonsense", encoding="utf-8")
    (parties.folder / "secret.key").write_bytes((keys / "b.key_secret").read_bytes())
    (parties.folder / "twin.key").write_bytes((keys / "a.key").read_bytes())
    (parties.folder / "sp ace.key").write_bytes((keys / "b.key").read_bytes())
    (parties.folder / "gone.key").symlink_to(parties.folder / "nowhere")
    (parties.folder / "folder.key").mkdir()
    (parties.folder / "b.txt").write_bytes((keys / "b.key").read_bytes())
    assert parties.allowed(key(parties, "a")) == "a"
    assert parties.allowed(key(parties, "b")) is None
    assert sorted(parties.problems) == [
        "broken.key",
        "folder.key",
        "gone.key",
        "secret.key",
        "sp ace.key",
        "twin.key",
    ]
    assert load_keys(keys / "b.key_secret").secret.decode() not in str(parties.problems)


def test_only_a_public_file_is_added(parties):
    keys = parties.folder.parent / "keys"
    with pytest.raises(KeyFileError, match="not a public key file"):
        parties.add(keys / "b.key_secret")
    disguised = keys / "c.key"
    disguised.write_bytes((keys / "b.key_secret").read_bytes())
    with pytest.raises(KeyFileError, match="not a public key file"):
        parties.add(disguised)
    assert parties.names() == ["a"]
    assert not any(b"secret-key" in path.read_bytes() for path in parties.folder.iterdir())


def test_adding_twice_is_harmless_and_names_and_keys_are_not_taken_over(parties):
    keys = parties.folder.parent / "keys"
    assert parties.add(keys / "a.key") == "a"
    (keys / "z.key").write_bytes((keys / "a.key").read_bytes())
    with pytest.raises(KeyFileError, match="'a'"):
        parties.add(keys / "z.key")
    new_keys("a", keys / "other")
    with pytest.raises(KeyFileError, match="revoke it first"):
        parties.add(keys / "other" / "a.key")
    assert parties.allowed(key(parties, "a")) == "a"


def test_revoking_somebody_unknown_names_who_is_there(parties):
    with pytest.raises(KeyFileError) as caught:
        parties.revoke("b")
    assert "Expected: a" in str(caught.value)


# ---- signing identities


def test_a_new_public_file_carries_the_signing_key_and_zeromq_still_reads_it(made):
    public, secret = made
    keys = load_keys(secret)
    assert load_signing(public).public_bytes_raw() == signing_key(keys).public_key().public_bytes_raw()
    assert zmq.auth.load_certificate(public) == (keys.public, None)
    assert find_signing(secret) is None
    assert keys.secret.decode() not in public.read_text()


def test_the_signing_key_follows_from_the_secret_alone(made, tmp_path):
    keys = load_keys(made[1])
    assert signing_key(keys).private_bytes_raw() == signing_key(load_keys(made[1])).private_bytes_raw()
    other = load_keys(new_keys("other", tmp_path)[1])
    assert signing_key(other).private_bytes_raw() != signing_key(keys).private_bytes_raw()
    assert signing_key(keys).private_bytes_raw() != z85_decode(keys.secret)


def without_signing(path):
    kept = [line for line in path.read_text().splitlines() if "signing-" not in line]
    path.write_text("\n".join(kept) + "\n")


def test_a_file_from_before_says_how_to_make_it_anew(made):
    public, secret = made
    whole = public.read_bytes()
    without_signing(public)
    assert find_signing(public) is None
    with pytest.raises(KeyFileError, match="no signing key") as caught:
        load_signing(public)
    assert "splitfl keys identity hospital.key_secret" in str(caught.value)
    assert renew_public(secret) == public
    assert public.read_bytes() == whole
    public.unlink()
    renew_public(secret)
    assert public.read_bytes() == whole


def test_renewing_does_not_write_over_another_key(made, tmp_path):
    public, secret = made
    public.write_bytes(new_keys("other", tmp_path)[0].read_bytes())
    with pytest.raises(KeyFileError, match="another key"):
        renew_public(secret)
    with pytest.raises(KeyFileError, match="not a secret key file"):
        renew_public(public)


def test_a_signing_key_of_another_party_is_refused(made, tmp_path):
    public, _ = made
    other, _ = new_keys("other", tmp_path)
    stolen = [line for line in other.read_text().splitlines() if "signing-" in line]
    lines = [line for line in public.read_text().splitlines() if "signing-" not in line]
    for forged in (stolen, stolen[:1], stolen[1:], ['    signing-key = "00"', stolen[1]], ['    signing-key = ""']):
        public.write_text("\n".join([*lines[:3], *forged, *lines[3:]]) + "\n")
        for use in (load_signing, find_signing, AllowList(tmp_path / "peers").add):
            with pytest.raises(KeyFileError, match="does not belong"):
                use(public)
    assert not (tmp_path / "peers").exists()


def test_the_allow_list_keeps_the_signing_key_and_takes_it_in_later(made, tmp_path):
    public, secret = made
    without_signing(public)
    peers = AllowList(tmp_path / "peers")
    assert peers.add(public) == "hospital"
    assert find_signing(tmp_path / "peers" / "hospital.key") is None
    renew_public(secret)
    assert peers.add(public) == "hospital"
    assert load_signing(tmp_path / "peers" / "hospital.key") is not None
    assert peers.allowed(load_public(public)) == "hospital"


def test_identities_are_those_of_the_folder(made, tmp_path):
    folder = tmp_path / "peers"
    peers = AllowList(folder)
    peers.add(made[0])
    other, other_secret = new_keys("other", tmp_path)
    peers.add(other)
    found = load_identities(folder)
    assert set(found) == {load_public(made[0]).decode(), load_public(other).decode()}
    for secret in (made[1], other_secret):
        keys = load_keys(secret)
        expected = signing_key(keys).public_key().public_bytes_raw()
        assert found[keys.public.decode()].public_bytes_raw() == expected
    (folder / "twin.key").write_bytes(other.read_bytes())
    with pytest.raises(KeyFileError, match="same key"):
        load_identities(folder)
    without_signing(folder / "twin.key")
    (folder / "other.key").unlink()
    with pytest.raises(KeyFileError, match="no signing key"):
        load_identities(folder)
    with pytest.raises(KeyFileError, match="no key file"):
        load_identities(tmp_path / "nowhere")


def test_signing_fingerprints_differ_from_those_of_the_keys(made):
    public, _ = made
    shown = signing_fingerprint(load_signing(public))
    assert shown.startswith("SHA256:")
    assert shown != fingerprint(load_public(public))


@pytest.mark.parametrize("command", ["identity", "show"])
def test_the_commands_show_both_fingerprints(made, command, capsys):
    public, secret = made
    if command == "identity":
        without_signing(public)
    with pytest.raises(SystemExit) as stop:
        main(["keys", command, str(secret if command == "identity" else public)])
    assert not stop.value.code
    out = capsys.readouterr().out
    assert signing_fingerprint(load_signing(public)) in out
    assert (fingerprint(load_public(public)) in out) == (command == "show")
