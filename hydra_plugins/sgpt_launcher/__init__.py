"""Plugin package that Hydra finds by scanning the namespace `hydra_plugins`; that folder must stay without an
__init__.py.
"""
