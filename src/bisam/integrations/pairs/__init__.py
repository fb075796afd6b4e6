"""Pairs: two ranks that answer the independent queries of a method in parallel.

Each name below is documented in `bisam.integrations.pairs.method`:

    from bisam.integrations.pairs import InPairs, replica, replicas
"""

from bisam.integrations.pairs.method import InPairs as InPairs, replica as replica, replicas as replicas
