"""The generative reward model (GRM): a language model that compares the answers of a group.

``judge.py`` is the way in: it says who meets whom and what the verdicts are worth.
``comparison.py`` writes the question and reads the verdict, ``endpoint.py`` and ``frozen.py`` are
the two models that can be asked, ``retries.py`` is what happens when one does not answer well.

Source: technical report (arXiv:2602.02276), Sec. 4.4.2; K2 report (arXiv:2507.20534), Sec. 3.2.2.
"""
