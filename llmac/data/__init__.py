"""Where prompts come from: datasets turned into tokenized prompts, and an endless resumable stream of them.

`tables.py`    a Hub id, file, saved folder or list of dicts -> rows (dicts), with errors that name file and line
`prompts.py`   rows -> `Prompt`s (template, column or known names; chat template; length limits), and `PromptStream`

Read `prompts.py` first. May import `core` and `errors`; `datasets` is imported at use.
"""
