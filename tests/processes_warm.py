"""What a fork server preloads (processes.py): its threads have computed before it forks."""

from processes import work

work()
