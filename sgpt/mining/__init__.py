"""Hard negatives for the judged queries of a BEIR folder, or for pairs in a file, as training rows of JSON lines.

A ranker (BM25, a model, a run file) ranks documents for each query; rules choose negatives from the ranking, in this
order:

    1. documents are different texts: blank ones and copies of an earlier one are left out
    2. never a judged positive, a text equal to one, or a text equal to the query; queries of equal text share their
       positives
    3. of the others the ranks first_rank … last_rank, 1 is the best; equal scores rank in the order of the corpus
    4. a cross-encoder may score this window and the positives again; its scores then order the window
    5. score_margin and score_ratio, against the weakest positive of the query, by the same scorer
    6. the first `negatives_per_query`, or as many at random
    7. with on_few=drop, queries that have fewer are left out

The ratio is the rule "TopK-PercPos" of NV-Retriever (arXiv 2407.15831), there with 0.95.

In reading order: config, task (1, 2), rankers, rules (3 to 7), report, mine (the whole). What a killed job leaves
behind is in sgpt/runtime/jobs.py.
"""

from sgpt.mining.config import MineConfig
from sgpt.mining.mine import mine
from sgpt.mining.report import page_of, table

__all__ = ["MineConfig", "mine", "page_of", "table"]
