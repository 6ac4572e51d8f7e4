"""One file a section: each reads a run record and gives a section, or says in one sentence why there is none."""
