"""`splitfl compare`: protocols x mechanisms x cuts x seeds x data sets, from one file.

    grid      what the file says                        cells     every run that it asks for
    places    models and rows on this machine           ground    kit, emulator and measures that cells share
    run_cell  one cell: real processes, then an audit   result    what came out, one file a cell
    summary   means over seeds, one row a design        pareto    which rows no other beats
    advise    limits in, a design and reasons out       report    table, CSV and page

Nothing in this folder computes with a tensor: what is compared is made by the commands that people use.
"""
