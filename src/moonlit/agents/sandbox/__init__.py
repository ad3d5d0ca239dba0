"""Untrusted code in an isolated IPython worker, one a rollout.

``pool.py`` is the way in. It starts one *template*: a separate interpreter with a scrubbed
environment that has imported IPython, numpy, Pillow, scipy, networkx and matplotlib and runs
nobody's code. Every worker is a fork of it: milliseconds to start and a few MiB of its own. A fork
confines itself for good (``confinement.py``) before it reads its first request (``kernel.py``).
Worker and trainer speak framed JSON (``frames.py``); nothing a worker sends is ever unpickled, and
its pictures come as raw pixels.
"""
