"""The wire: typed messages, checked frames, codecs, the session table, keys, and the one file that imports zmq."""
