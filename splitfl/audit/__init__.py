"""What can be recovered from what crosses. The road of an audit, read from top to bottom:

    recording   what crossed, kept as it was, encrypted at rest              (`splitfl tune --record`)
    traffic     the recording as the receiver saw it: one `Sent` a row
    view        all that an attacker is given: plan, traffic, knowledge; never the truth
    attacks/    one file each: `View` in, `Guesses` out
    truth       which row each `Sent` was; for scoring alone
    scoring     guesses against truth: metrics with intervals by record
    controls    the undefended twin, shuffled targets, an injected leak of known size
    card        the report card, one page

An attack cannot cheat by construction: what it is called with holds no row, no token id and no label. The command
stands in `party.audit`, since truth is the data holder's.
"""
