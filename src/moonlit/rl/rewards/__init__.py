"""Rewards: pure functions from an answer's words and the truth to a number in [0, 1].

| environment | form | file | source |
| --- | --- | --- | --- |
| grounding | soft F1 over IoU, best one-to-one matching | ``grounding`` | Sec. 4.4.2; form ours |
| pointing | soft F1 over a Gaussian of the distance | ``pointing`` | Sec. 4.4.2; sigma is ours |
| segmentation | IoU of the filled outlines | ``segmentation`` | Sec. 4.4.2 |
| ocr, caption | 1 - normalised edit distance | ``ocr`` | Sec. 4.4.2; the normaliser is ours |
| counting, chart_value | 1 - relative difference | ``counting`` | Sec. 4.4.2; the map is ours |
| wide_search | item F1 over names with their values | ``pairs`` | WideSearch; form ours |
| reasoning_gym | the dataset's own verifier | ``reasoning`` | rule-based outcome |
| mathematics | math-verify, in a process | ``mathematics`` | rule-based outcome |
| code | all tests pass, in the sandbox | ``code`` | rule-based outcome |
| any, a share | the answer's form | ``format`` | K2; form ours |
| any, on top | pairwise scores by a language model | ``grm/`` | Sec. 4.4.2; form ours |
| all others | 1 if the answer is the truth, else 0 | ``exact`` | rule-based outcome |

Sections are those of the technical report (arXiv:2602.02276). An answer that cannot be read earns
0. Where nothing is there to be boxed, pointed to or listed (the truth is an empty list), ``none``
or ``[]`` earns 1 and all else 0 (ours). A reward that is broken raises (``rules.RuleJudge``), and
so does a truth that no answer could meet (``truths``): neither is confused with a wrong answer.
"""
