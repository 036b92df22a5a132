"""Whether what others serve is what was trained: a folder by every loader, and a running server under every condition.

`config.py` has the keys of train/verify.py, `folder.py` the loaders' comparison, `clients.py` the APIs, `conditions.py`
how texts are sent, `diagnosis.py` what known faults would give, `server.py` joins the last three, `table.py` shows all.
"""
