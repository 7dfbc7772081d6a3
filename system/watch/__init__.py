"""``espalier watch``: a run in the browser, read from its directory alone and never written to.

``tail``, ``records`` and ``index`` read what a run writes, each byte once; ``query``, ``drawing`` and
``views`` are pure functions of that; ``reader`` ties them together for one run; ``server`` serves them to one
page (``static``), and ``mail`` makes one file of a tree.
"""
