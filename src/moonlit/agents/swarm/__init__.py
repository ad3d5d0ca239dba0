"""The agent swarm: a trained orchestrator that splits work over frozen sub-agents (PARL).

Source: Kimi K2.5 technical report (arXiv:2602.02276), Sec. 3.
"""
