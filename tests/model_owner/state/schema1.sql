-- A state as the first version of the schema left it, written by an owner that was killed while `clinic` was there.
PRAGMA journal_mode = WAL;
CREATE TABLE splitfl_state (name VARCHAR PRIMARY KEY, value VARCHAR NOT NULL);
CREATE TABLE parties (
    fingerprint VARCHAR NOT NULL, party VARCHAR NOT NULL, first_seen FLOAT NOT NULL, last_seen FLOAT NOT NULL,
    PRIMARY KEY (fingerprint, party));
CREATE TABLE sessions (
    name VARCHAR PRIMARY KEY, server VARCHAR NOT NULL, party VARCHAR NOT NULL, fingerprint VARCHAR NOT NULL,
    protocol VARCHAR NOT NULL, wire_dtype VARCHAR NOT NULL, opened FLOAT NOT NULL, ended FLOAT, why VARCHAR,
    seconds FLOAT NOT NULL DEFAULT 0, tokens BIGINT NOT NULL DEFAULT 0, bytes_in BIGINT NOT NULL DEFAULT 0,
    bytes_out BIGINT NOT NULL DEFAULT 0, requests BIGINT NOT NULL DEFAULT 0, steps BIGINT NOT NULL DEFAULT 0);
CREATE TABLE usage (
    party VARCHAR NOT NULL, day VARCHAR NOT NULL, sessions BIGINT NOT NULL DEFAULT 0,
    session_seconds FLOAT NOT NULL DEFAULT 0, tokens BIGINT NOT NULL DEFAULT 0, bytes_in BIGINT NOT NULL DEFAULT 0,
    bytes_out BIGINT NOT NULL DEFAULT 0, requests BIGINT NOT NULL DEFAULT 0, steps BIGINT NOT NULL DEFAULT 0,
    PRIMARY KEY (party, day));
INSERT INTO splitfl_state VALUES ('schema', '1');
INSERT INTO parties VALUES ('SHA256:AAAA', 'hospital', 1793577600.0, 1793750400.0);
INSERT INTO parties VALUES ('SHA256:BBBB', 'clinic', 1793750400.0, 1793750500.0);
INSERT INTO sessions VALUES
    ('aa01', 'owner', 'hospital', 'SHA256:AAAA', 'split', 'float32', 1793577600.0, 1793577700.0, 'closed', 100.0, 1000,
     4000, 4100, 10, 5),
    ('aa02', 'owner', 'hospital', 'SHA256:AAAA', 'split', 'float32', 1793750300.0, 1793750400.0, 'closed', 100.0, 500,
     2000, 2050, 5, 2),
    ('bb01', 'owner', 'clinic', 'SHA256:BBBB', 'split', 'bfloat16', 1793750400.0, NULL, NULL, 90.0, 70, 300, 310, 3, 0);
INSERT INTO usage VALUES ('hospital', '2026-11-02', 1, 100.0, 1000, 4000, 4100, 10, 5);
INSERT INTO usage VALUES ('hospital', '2026-11-04', 1, 100.0, 500, 2000, 2050, 5, 2);
INSERT INTO usage VALUES ('clinic', '2026-11-04', 1, 90.0, 70, 300, 310, 3, 0);
