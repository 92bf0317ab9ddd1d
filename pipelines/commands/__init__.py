"""What each subcommand of remit does around its stage: resolve names, show progress, call the stage, print the outcome.

One file per command; `run(config, should_stop)` returns the exit code. Heavy imports (torch, transformers, Ray) stand inside of
functions, so that --help and a mistyped path are answered at once.
"""
