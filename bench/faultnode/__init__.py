"""A seeded node that joins and signs as ours does, with a scripted model for an engine, and misbehaves on command.

    python -m bench.faultnode --gateway http://127.0.0.1:8080 --join emj_... --data-dir /tmp/n1 --mode hang --share 0.3

`speaking` is another node, of another make: it does not join; it chats, completes and makes images. `speech_modes` is
the table of what it can do wrong.

`modes` is the table of what it can do wrong; `scripted` has its vectors, which a bench can check, and its speed.
"""
