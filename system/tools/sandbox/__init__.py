"""What runs inside the sandbox's processes: standard library only, nothing that a stray import could drag in.

``forkserver`` is the helper process; ``cell`` builds its file system; ``lockdown`` confines a child for good;
``program`` runs the model's code; ``seccomp`` and ``kernel`` are the system calls behind it.
``system.tools.sandbox.sandbox`` is the side that the rest of the system sees.
"""
