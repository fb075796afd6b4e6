"""Launch: many runs, in processes of this machine or on a Ray cluster, and how long they will take."""
