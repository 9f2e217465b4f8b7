"""Many samples, kept: a job is completed file by file in a store, on one machine or by several.

`job` says what is wanted and under which names; `formats` what is in a file; `store` where files lie, a folder or an
object store; `run` makes what is missing; `verify` makes some again and compares; `card` describes it to people;
`cluster` has Ray make the files; `report` says how far it is. `sweep` is for a few pictures between two samples, or at
several temperatures. `wanted` is what the command is asked for, and `commands` what it does.

A file is a pure function of the job and its range. So a file that is made twice is the same, whoever makes it, and what
was stopped is completed by making what is missing.
"""
