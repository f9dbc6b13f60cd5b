"""Codes of the launch plane: job files, profiles, flags, launchers, runs, commands."""

from __future__ import annotations

from collections.abc import Mapping

from dtrain.codes.entry import Entry

LAUNCH: Mapping[str, Entry] = {
    "usage.unknown-command": Entry(
        "dtrain has no command of this name.",
        "Run `dtrain --help`; it lists all commands.",
    ),
    "usage.unknown-option": Entry(
        "The command has no such option.",
        "Run the command with `--help`; it lists all options.",
    ),
    "usage.missing-argument": Entry(
        "The command needs an argument that was not given.",
        "Add the argument. `--help` shows its place in the command line.",
    ),
    "usage.unexpected-argument": Entry(
        "The command was given more arguments than it takes.",
        "Remove the argument. Options begin with a dash, and the arguments of a script "
        "follow `--`.",
    ),
    "usage.option-of-script": Entry(
        "An option of the script is written among the options of dtrain.",
        "Put `--` before the arguments of the script.",
    ),
    "usage.option-of-torchrun": Entry(
        "The command line has an option of torchrun that dtrain does not have.",
        "Write the command line that the message shows. docs/script.md lists torchrun's options.",
    ),
    "usage.not-a-job": Entry(
        "The file is neither a job file nor a Python script.",
        "Give the path of a `.yaml` or a `.py` file.",
    ),
    "usage.invalid-value": Entry(
        "An option has a value that it cannot have.",
        "Give one of the values that the message or `--help` names.",
    ),
    "usage.option-without-value": Entry(
        "An option that needs a value has none, or an option that takes none has one.",
        "Write the option as `--help` shows it.",
    ),
    "usage.flag-without-effect": Entry(
        "A flag has no effect, because it needs another flag or is replaced by another flag.",
        "Add the flag that the message names, or remove this one.",
    ),
    "usage.flag-of-other-launcher": Entry(
        "A flag belongs to a launcher that does not start this run.",
        "Choose that launcher with `--launcher`, or remove the flag.",
    ),
    "usage.set-syntax": Entry(
        "A `--set` is not of the form FIELD=VALUE.",
        "Write it like `--set train.epochs=3`.",
    ),
    "usage.variable-not-set": Entry(
        "`--env NAME` passes on a variable that is not set in this shell.",
        "Set the variable first, or give its value with `--env NAME=VALUE`.",
    ),
    "usage.run-id": Entry(
        "The value of `--run-id` cannot be used as the name of a directory and of a job.",
        "Use letters, digits, dots, dashes and underscores.",
    ),
    "usage.where-syntax": Entry(
        "A `--where` is not a name, an operator and a value, or it compares a text as a number.",
        "Write it in quotes, like `--where 'train.loss<0.1'`. Operators are = != < <= > and >=.",
    ),
    "usage.unknown-name": Entry(
        "No run has a column, a field of its job or a metric of this name.",
        "Take the name that the message suggests, or one of `dtrain status --json`. A metric is "
        "written with its split, like `eval.accuracy`.",
    ),
    "usage.not-confirmed": Entry(
        "A command that removes something cannot ask, because its input is no terminal.",
        "Look at the list with `--dry-run`, then run the command with `--yes`.",
    ),
    "init.files-exist": Entry(
        "`dtrain init` would overwrite files.",
        "Give another directory, or `--force` to overwrite the files that the message names.",
    ),
    "init.no-file": Entry(
        "`--from` names a file that is not there, or a directory.",
        "Give the path of a script, or a command line in quotes.",
    ),
    "init.no-command": Entry(
        "What `--from` names has no command that starts a training.",
        "Give a script or a line with `torchrun SCRIPT`, `srun PROGRAM` or `python SCRIPT`.",
    ),
    "init.several-commands": Entry(
        "A script for `--from` starts several trainings, and a job is one of them.",
        "Give one of the lines that the message lists, in quotes, to `--from`.",
    ),
    "init.unknown-option": Entry(
        "A torchrun line for `--from` has an option that torchrun does not have.",
        "Correct the option, or remove it from the line.",
    ),
    "usage.sweep-syntax": Entry(
        "A `--sweep` is not of the form FIELD=VALUE,VALUE,… or FIELD=FIRST..LAST.",
        "Write it like `--sweep args.lr=0.1,0.01`, `--sweep seed=0..4`, or with `--sample` "
        "`--sweep 'args.lr=log(1e-5..1e-1)'`.",
    ),
    "usage.sweep-range": Entry(
        "A range is not of whole numbers, so it has no list of values.",
        "Add `--sample N`, which takes random values of it, or list the values.",
    ),
    "usage.sweep-repeats": Entry(
        "A field of a sweep is given twice, or two of its runs would be the same.",
        "Remove one of the two.",
    ),
    "usage.sweep-too-few": Entry(
        "There are fewer combinations of values than `--sample` asks for.",
        "Ask for fewer, or leave out `--sample`, which takes all.",
    ),
    "usage.sweep-too-many": Entry(
        "A sweep would have more runs than dtrain starts at once.",
        "Take random ones with `--sample N`, or make several sweeps.",
    ),
    "usage.sweep-secret": Entry(
        "A sweep sets a variable whose values are secret, and which is kept nowhere on a disk.",
        "Launch these runs one by one with `--env NAME=VALUE`.",
    ),
    "usage.sweep-unsupported": Entry(
        "The launcher cannot start several runs.",
        "Use launcher local, slurm or ray, or launch the runs one by one.",
    ),
    "sweep.file-shape": Entry(
        "The file of `--sweep-file` is not a list with the values of each run.",
        "Write it like `- {args.lr: 0.1, seed: 3}`, with a line for each run.",
    ),
    "sweep.finished": Entry(
        "All runs of the sweep have succeeded, or are running.",
        "To train longer, set a later end, for example `--set train.epochs=20`.",
    ),
    "usage.detach-unsupported": Entry(
        "The launcher's processes end with the command, so the command cannot return before them.",
        "Use launcher slurm, or launcher ray with `-o submit=job`; or leave out `--detach`.",
    ),
    "file.not-found": Entry(
        "There is no file of this name.",
        "Check the path. The message names a file of a similar name, if there is one.",
    ),
    "file.is-a-directory": Entry(
        "The path is that of a directory, but a file is needed.",
        "Give the path of the YAML file in that directory.",
    ),
    "file.not-regular": Entry(
        "The path is that of a pipe or a device, not of a regular file.",
        "Write the text to a file, and give the path of that file.",
    ),
    "file.too-large": Entry(
        "The file is much larger than a job or a profile can be.",
        "Check that the path names the right file.",
    ),
    "file.not-utf8": Entry(
        "The file is not text in UTF-8.",
        "Save it as UTF-8. The message shows the line with the wrong byte.",
    ),
    "file.unreadable": Entry(
        "The file exists, but it cannot be read.",
        "Check its permissions, and those of its directories.",
    ),
    "file.not-writable": Entry(
        "A file cannot be written.",
        "Choose another directory, free space on the disk, or change the permissions of "
        "the directory.",
    ),
    "file.not-usable": Entry(
        "The system refuses to open a file or a directory.",
        "The message gives the system's reason. Check the path and its permissions.",
    ),
    "file.console-gone": Entry(
        "The output of the command cannot be written: the terminal is closed, or the disk is full.",
        "Run the command again where its output can be written.",
    ),
    "file.current-directory-gone": Entry(
        "The current directory was removed while the shell was using it.",
        "Change to a directory that exists.",
    ),
    "yaml.syntax": Entry(
        "The file is not valid YAML at this line.",
        "Check this line and the line above it: quotes, brackets, colons and indentation.",
    ),
    "yaml.empty": Entry(
        "The file has no content.",
        "Write at least the fields that the message names.",
    ),
    "yaml.not-a-section": Entry(
        "The file contains a list or a single value instead of `name: value` lines.",
        "Write the fields as `name: value` lines.",
    ),
    "yaml.duplicate-key": Entry(
        "The same key is written twice in a section, but it can have only one value.",
        "Remove one of the two lines.",
    ),
    "yaml.key-not-text": Entry(
        "A key is not text: YAML reads some words as other values, for example `on` as true.",
        "Put the key in quotes.",
    ),
    "yaml.value-unsupported": Entry(
        "A value has a YAML type, a size or an escape that dtrain does not read.",
        "Write plain text, a number, a boolean, a list or a section.",
    ),
    "yaml.merge-without-section": Entry(
        "`<<` copies the lines of another section, but its value is not a section.",
        "After `<<:`, write the alias of a section, for example `*defaults`.",
    ),
    "yaml.too-deep": Entry(
        "Sections are nested too deeply, or an alias contains itself.",
        "Write the file with fewer levels, and check its aliases.",
    ),
    "yaml.too-many-values": Entry(
        "The file has more values than a job or a profile can need.",
        "Keep large data in a separate file that the task reads.",
    ),
    "job.unknown-field": Entry(
        "job.yaml has no field of this name, or the field belongs to another section.",
        "Use the name that the message suggests, or move the line to the section that it "
        "names. docs/job-file.md lists all fields.",
    ),
    "job.missing-field": Entry(
        "A required field is missing in job.yaml.",
        "Add the field.",
    ),
    "job.wrong-type": Entry(
        "A field has a value of the wrong kind, for example text where a number is needed.",
        "Write a value of the kind that the message names.",
    ),
    "job.out-of-range": Entry(
        "A number is smaller or larger than the field allows.",
        "Choose a number within the bounds that the message names.",
    ),
    "job.invalid-value": Entry(
        "The value of a field is not valid.",
        "Write a value in the form that the message shows.",
    ),
    "job.unknown-name": Entry(
        "The trainer or the strategy does not exist, or its package is not installed.",
        "Use one of the names that the message lists.",
    ),
    "job.field-without-effect": Entry(
        "A field would have no effect in this job, for example because it belongs to "
        "another trainer.",
        "Remove the field, or set the field that the message names.",
    ),
    "job.field-decided-elsewhere": Entry(
        "An argument of the framework's own trainer is already set by other fields of the job.",
        "Set the field that the message names, and remove the argument.",
    ),
    "job.endless-training": Entry(
        "The job has neither `train.epochs` nor `train.steps`, so it would never end.",
        "Set one of the two.",
    ),
    "job.micro-batch-too-large": Entry(
        "`train.micro_batch_size` is larger than `train.global_batch_size`.",
        "Make the micro batch smaller, or leave it out.",
    ),
    "job.no-evaluation-to-stop-by": Entry(
        "`train.early_stopping` needs evaluations during the training, and there are none.",
        "Set `eval.every_steps` or `eval.every_epochs`.",
    ),
    "job.two-precisions": Entry(
        "`fsdp.param_dtype` and `train.precision` ask for two ways to compute with 16 bits.",
        "Keep `train.precision` for autocast, which is the same under every strategy, or "
        "`fsdp.param_dtype` with `train.precision: fp32`.",
    ),
    "job.no-mtbf": Entry(
        "With `checkpoint.every: auto`, the best time between checkpoints depends on the mean time "
        "between failures, which is not given.",
        "Set `checkpoint.mtbf`, for example to `12h`, or give a time in `checkpoint.every`.",
    ),
    "job.fault-after-the-end": Entry(
        "An injected fault is planned for a step after the end of the training.",
        "Choose a step up to `train.steps`.",
    ),
    "job.profile-after-the-end": Entry(
        "A step after the end of the training is to be profiled.",
        "Choose steps up to `train.steps`.",
    ),
    "job.reference-syntax": Entry(
        "The reference to a class does not have the right form.",
        "Write `file.py:Class` or `package.module:Class`.",
    ),
    "job.code-not-found": Entry(
        "The file or the module of a class does not exist.",
        "Check the path; it is relative to job.yaml. A module must be importable from the "
        "directory of job.yaml.",
    ),
    "job.class-not-found": Entry(
        "The file exists, but it has no class of this name.",
        "Use one of the classes that the message lists.",
    ),
    "job.task-incomplete": Entry(
        "The task's class lacks methods that every task must have.",
        "Add the methods that the message names.",
    ),
    "job.unknown-argument": Entry(
        "`args` has an argument that the class does not take.",
        "Remove it, or use a name that the message lists.",
    ),
    "job.missing-argument": Entry(
        "The class needs an argument that `args` does not have.",
        "Add it to `args`.",
    ),
    "job.relative-import": Entry(
        "A file that is given by its path has no package, so it cannot use relative imports.",
        "Import the module by its full name, or refer to the class as `package.module:Class`.",
    ),
    "job.not-python": Entry(
        "The file is not valid Python.",
        "Correct the line that the message names.",
    ),
    "job.missing-import": Entry(
        "The code imports a package that this Python does not have.",
        "Install the package in the environment that runs dtrain.",
    ),
    "job.script-not-found": Entry(
        "There is no script at this path.",
        "Check the path; in job.yaml it is relative to job.yaml.",
    ),
    "job.script-only-defines": Entry(
        "The script only defines functions and classes, so launching it would do nothing.",
        "Launch the job.yaml that names its task.",
    ),
    "job.module-not-found": Entry(
        "`python -m` would not find this module, or it is a package without a `__main__.py`.",
        "Give the dotted name of a module in the directory of job.yaml, or of an installed one.",
    ),
    "job.accelerate-config": Entry(
        "A setting in the config file of Accelerate cannot be followed.",
        "Change it, or leave `accelerate_config` out and give the number of processes in `launch`.",
    ),
    "job.command-not-found": Entry(
        "There is no program at this path.",
        "Check the path; in job.yaml it is relative to job.yaml.",
    ),
    "job.command-not-executable": Entry(
        "The program's file may not be executed.",
        "Run `chmod +x` on it, or name its interpreter first: `[bash, train.sh]`.",
    ),
    "job.data-not-found": Entry(
        "A path of `data.paths`, or that of `checkpoint.init_from`, does not exist.",
        "Check the path; it is relative to job.yaml.",
    ),
    "profile.not-found": Entry(
        "There is no profile of this name in any of the directories that are searched.",
        "Use a name that `dtrain launchers` lists, or write `launchers/NAME.yaml`.",
    ),
    "profile.circle": Entry(
        "Profiles extend one another in a circle.",
        "Remove one of the `extends:` lines that the message shows.",
    ),
    "profile.unknown-launcher": Entry(
        "The profile names a launcher that does not exist.",
        "Use one of the launchers that the message lists.",
    ),
    "profile.unknown-field": Entry(
        "A profile has no field of this name.",
        "Use the name that the message suggests. Options of the launcher belong under `options:`.",
    ),
    "profile.missing-field": Entry(
        "A required field is missing in the profile.",
        "Add the field.",
    ),
    "profile.wrong-type": Entry(
        "A field of the profile has a value of the wrong kind.",
        "Write a value of the kind that the message names.",
    ),
    "profile.out-of-range": Entry(
        "A number in the profile is smaller or larger than the field allows.",
        "Choose a number within the bounds that the message names.",
    ),
    "profile.invalid-value": Entry(
        "The value of a field of the profile is not valid.",
        "Write a value in the form that the message shows.",
    ),
    "option.syntax": Entry(
        "A `-o` is not of the form NAME=VALUE.",
        "Write it like `-o partition=gpu`.",
    ),
    "option.given-twice": Entry(
        "An option of the launcher is given twice on the command line.",
        "Remove one of the two.",
    ),
    "option.conflict": Entry(
        "Two options of the launcher exclude each other, or one needs another.",
        "Change or remove one of them, as the message explains.",
    ),
    "option.unknown-field": Entry(
        "The launcher has no option of this name.",
        "Use one that the message names; `dtrain launchers NAME` lists all.",
    ),
    "option.missing-field": Entry(
        "The launcher needs an option that was not given.",
        "Add the option to the profile, or give it with `-o NAME=VALUE`.",
    ),
    "option.wrong-type": Entry(
        "An option of the launcher has a value of the wrong kind.",
        "Write a value of the kind that the message names.",
    ),
    "option.out-of-range": Entry(
        "A number is smaller or larger than the option allows.",
        "Choose a number within the bounds that the message names.",
    ),
    "option.invalid-value": Entry(
        "The value of an option of the launcher is not valid.",
        "Write a value in the form that the message shows.",
    ),
    "plan.unsupported-combination": Entry(
        "This trainer does not support this strategy, or not with this number of nodes, or the "
        "strategy does not support a setting of the job.",
        "Use the combination that the message names. README.md has a table of all combinations.",
    ),
    "plan.unknown-name": Entry(
        "No launcher, strategy, trainer or logger of this name is installed.",
        "Use one of the names that the message lists, or install the package that provides it.",
    ),
    "plan.missing-package": Entry(
        "A package that this feature needs is not installed.",
        "Install it with the pip command in the message.",
    ),
    "plan.more-processes-than-gpus": Entry(
        "More processes than GPUs per node were requested.",
        "Use as many processes as GPUs, or leave the number of processes out.",
    ),
    "plan.single-is-one-process": Entry(
        "Strategy single uses one process, but more were requested.",
        "Use strategy ddp, or leave out `--procs` and `--gpus`.",
    ),
    "plan.too-few-gpus": Entry(
        "This machine has fewer GPUs than the launch needs.",
        "Request fewer GPUs, or launch on a machine that has more.",
    ),
    "plan.uneven-shards": Entry(
        "The strategy splits each step into parts that this number of processes cannot "
        "share evenly.",
        "Use a number of processes that the message names.",
    ),
    "plan.uneven-replicas": Entry(
        "`fsdp.replicas` does not divide the number of processes.",
        "Use a multiple of `fsdp.replicas` processes, also for each number of nodes that "
        "`launch.nodes` allows.",
    ),
    "plan.offload-without-gpus": Entry(
        "`fsdp.cpu_offload` is for GPUs, and the launch has none.",
        "Leave it out, or launch with `--gpus`.",
    ),
    "plan.sharded-stream": Entry(
        "A data stream that shards itself does not work with this strategy, or with a "
        "number of processes that changes.",
        "Use what the message names: another strategy, a fixed number of nodes, or a "
        "stream that is the same on every rank.",
    ),
    "plan.absent-rank": Entry(
        "A fault is to be injected on a rank that the launch does not have.",
        "Choose a rank that exists, or launch more processes.",
    ),
    "plan.profile-of-absent-rank": Entry(
        "A rank is to be profiled that the launch does not have.",
        "Choose a rank that exists, or launch more processes.",
    ),
    "plan.launcher-needs-directory": Entry(
        "This launcher cannot keep its runs at a URL.",
        "Give a directory that all nodes share with `--runs`, or use a launcher that takes a URL.",
    ),
    "bench.failed": Entry(
        "A run that `dtrain bench` has launched failed.",
        "The message has the error of the run. `dtrain why RUN` shows it again.",
    ),
    "launch.not-writable": Entry(
        "The run directory cannot be written.",
        "Choose another directory with `--runs`, or free space on the disk.",
    ),
    "launch.command-not-started": Entry(
        "The system could not start the command of the launch.",
        "The message gives the system's reason. Check that the program exists and is executable.",
    ),
    "launch.too-few-open-files": Entry(
        "A process may open fewer files here than the launch needs.",
        "Raise the limit, for example with `ulimit -n 4096`, and launch again.",
    ),
    "launch.port-not-opened": Entry(
        "The port of the rendezvous cannot be opened on this host.",
        "Launch again, or choose another address with `--rdzv-endpoint`.",
    ),
    "launch.no-free-port": Entry(
        "No free port was found on the host.",
        "Wait until other programs end, or stop some of them.",
    ),
    "launch.fork-server-ended": Entry(
        "The process that starts the workers of this comparison ended unexpectedly.",
        "Look for an error above this message. Check that there is enough memory, and try again.",
    ),
    "launch.driver-ended": Entry(
        "The process that drives the run ended unexpectedly.",
        "The message gives its last lines. Check that there is enough memory.",
    ),
    "run.not-found": Entry(
        "No run has this name.",
        "`dtrain runs` lists all runs. Give their directory with `--runs`.",
    ),
    "run.ambiguous": Entry(
        "Several runs begin with this text.",
        "Give more letters of the id.",
    ),
    "run.empty-name": Entry(
        "The name of a run is empty.",
        "Give an id, the beginning of one, or `last`.",
    ),
    "run.no-runs": Entry(
        "There are no runs in this directory.",
        "Give the directory of the runs with `--runs`.",
    ),
    "run.no-plan": Entry(
        "The directory is not a run directory.",
        "Give the id of a run that `dtrain runs` lists.",
    ),
    "run.no-such-attempt": Entry(
        "The run has no attempt of this number.",
        "Use one of the numbers that the message lists.",
    ),
    "run.no-such-log": Entry(
        "The attempt has no log of this rank or node.",
        "Use one that the message lists.",
    ),
    "run.exists": Entry(
        "A run with this id already exists.",
        "Continue it with `dtrain resume`, or choose another `--run-id`.",
    ),
    "run.finished": Entry(
        "The run has finished.",
        "To train longer, set a later end, for example `--set train.epochs=20`.",
    ),
    "run.end-passed": Entry(
        "The newest checkpoint is of a later step than the new end of the training.",
        "Set a later end.",
    ),
    "run.profile-passed": Entry(
        "The steps to be profiled were trained before the checkpoint from which the run continues.",
        "Choose later steps.",
    ),
    "run.setting-without-effect": Entry(
        "The setting is only used at the start of a run, so it would have no effect at a resume.",
        "Launch a new run with it.",
    ),
    "run.held": Entry(
        "Another command or job drives this run at the moment.",
        "Wait until it ends, or end it with `dtrain cancel`.",
    ),
    "run.started-by-hand": Entry(
        "The workers of the run were started by hand, so dtrain cannot stop them.",
        "Stop them where they were started.",
    ),
    "run.driven-elsewhere": Entry(
        "The command that drives the run is on another host.",
        "Cancel the run on that host.",
    ),
    "run.changed-meanwhile": Entry(
        "A run has changed between the list of what would be removed and the removal, for example "
        "because it was resumed or one of its checkpoints was pinned.",
        "Run `dtrain clean` again: it shows what would be removed now.",
    ),
    "run.code-gone": Entry(
        "The directory with the job's code is not on this host, and no copy of it was kept.",
        "Resume on a host that has the directory.",
    ),
    "run.damaged-file": Entry(
        "A file of the run does not contain what dtrain wrote.",
        "Restore the file from a copy, or remove the run.",
    ),
    "torchrun.no-node-rank": Entry(
        "Several hosts start this run, and this one does not know which node it is.",
        "Add `--node-rank` with a different number on each host.",
    ),
    "torchrun.invalid-node-rank": Entry(
        "The value of `--node-rank` is not the rank of a node of this run.",
        "Count the nodes from 0.",
    ),
    "torchrun.no-endpoint": Entry(
        "Several hosts start this run, and this one does not know where node 0 is.",
        "Add `--rdzv-endpoint HOST:PORT` with the address of node 0.",
    ),
    "torchrun.invalid-endpoint": Entry(
        "The address of `--rdzv-endpoint` is not HOST:PORT.",
        "Write it like `head:29400`.",
    ),
    "slurm.no-commands": Entry(
        "Slurm's commands are not installed on this machine.",
        "Run dtrain on a login node of the cluster.",
    ),
    "slurm.no-cluster": Entry(
        "No Slurm cluster answers on this machine.",
        "Run dtrain on a login node of the cluster.",
    ),
    "slurm.controller-silent": Entry(
        "Slurm's controller does not answer at the moment.",
        "Try again later. A job that was submitted is not affected.",
    ),
    "slurm.partition-invalid": Entry(
        "Slurm has no such partition, or it does not take this job.",
        "Set option `partition` to one that `sinfo` lists.",
    ),
    "slurm.account-invalid": Entry(
        "Slurm does not know the account, or it may not use this partition.",
        "Set option `account` to one that `sacctmgr show assoc` lists for you.",
    ),
    "slurm.qos-invalid": Entry(
        "The quality of service does not exist, or this account may not use it.",
        "Set option `qos` to one that your account has.",
    ),
    "slurm.time-invalid": Entry(
        "The time limit is longer than the partition allows, or not a time.",
        "Set option `time` to less; `sinfo` shows the limits.",
    ),
    "slurm.memory-invalid": Entry(
        "No node of the partition has so much memory.",
        "Set option `mem` to less.",
    ),
    "slurm.gres-invalid": Entry(
        "The partition has no such GPUs, or fewer on each node.",
        "Change `--gpus` or option `gres`; `sinfo -o %G` lists the GPUs.",
    ),
    "slurm.constraint-invalid": Entry(
        "No node has the feature that option `constraint` asks for.",
        "Use a feature that `sinfo -o %f` lists.",
    ),
    "slurm.reservation-invalid": Entry(
        "The reservation does not exist, has ended, or is not for you.",
        "Use one that `scontrol show reservation` lists, or remove the option.",
    ),
    "slurm.dependency-invalid": Entry(
        "Slurm does not know the job that this job must wait for.",
        "Check the number of that job in option `dependency`.",
    ),
    "slurm.node-name-invalid": Entry(
        "Slurm has no node of this name.",
        "Use names that `sinfo -N` lists.",
    ),
    "slurm.nodes-not-available": Entry(
        "The partition has no nodes with so many GPUs, cores or so much memory.",
        "Request fewer nodes, GPUs, cores or less memory, or use another partition.",
    ),
    "slurm.refused": Entry(
        "Slurm rejects the job for another reason, which the message gives.",
        "Change the option that Slurm's reason names.",
    ),
    "slurm.line-break": Entry(
        "A value for the batch script contains a line break.",
        "Write the value on one line.",
    ),
    "slurm.flag-not-allowed": Entry(
        "An extra sbatch flag conflicts with one that dtrain sets, or is not a long flag.",
        "Use the option of dtrain that the message names, or the flag's long name.",
    ),
    "slurm.flag-repeated": Entry(
        "A flag is given several times, but submitit accepts it only once.",
        "Give it once, or use `submit: sbatch`.",
    ),
    "slurm.path-not-usable": Entry(
        "Slurm or submitit cannot write to a path with this character.",
        "Choose a directory with another name with `--runs`.",
    ),
    "slurm.template-unreadable": Entry(
        "The template of the batch script cannot be read as text.",
        "Check its path and permissions, and save it as UTF-8.",
    ),
    "slurm.template-invalid": Entry(
        "The template of the batch script has a mistake.",
        "Correct the line that the message names. docs/slurm.md lists the variables.",
    ),
    "slurm.array-differs": Entry(
        "The runs of an array differ in an sbatch option that must be the same for the "
        "whole array.",
        "Launch them one by one.",
    ),
    "slurm.array-of-some": Entry(
        "submitit cannot submit some runs of a sweep as one array.",
        "Leave out `--at-once`, or use `submit: sbatch`.",
    ),
    "slurm.run-without-job": Entry(
        "The run that this run must wait for has no Slurm job.",
        "Give a run that was launched with launcher slurm.",
    ),
    "slurm.run-will-not-succeed": Entry(
        "The run that this run must wait for has failed or was cancelled.",
        "Launch without `--after`, or resume the other run first.",
    ),
    "slurm.directory-not-shared": Entry(
        "A node of the job does not see the run directory.",
        "With `--runs`, choose a directory that all nodes see at the same path.",
    ),
    "slurm.requeued-too-often": Entry(
        "Slurm has put the job back into the queue more often than option `requeue` allows.",
        "Find out why nodes fail, then resume the run.",
    ),
    "slurm.no-step": Entry(
        "The agent was not started as a step of a Slurm job.",
        "Start it with `srun`, or let `dtrain launch` do so.",
    ),
    "slurm.wrong-node-count": Entry(
        "The Slurm job step has a different number of nodes than the plan.",
        "Start it with the `srun` command in the message.",
    ),
    "slurm.head-silent": Entry(
        "The agent of the first node has not published its address.",
        "Look at the log of the first node; it may not have started, or may not see the "
        "run directory.",
    ),
    "slurm.names-unresolved": Entry(
        "A node cannot resolve the names of the other nodes.",
        "Ask the administrators to make the names of all nodes resolvable on each node.",
    ),
    "ray.no-cluster": Entry(
        "No Ray cluster answers at this address.",
        "Check the address; `ray start --head` prints it.",
    ),
    "ray.not-allowed": Entry(
        "The Ray cluster rejects this client; it may require a token.",
        "Set RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH as the message explains.",
    ),
    "ray.cannot-join": Entry(
        "The Ray cluster answers, but this client cannot join it.",
        "The message gives Ray's reason, often a different version of Ray or Python. Use "
        "the versions of the cluster.",
    ),
    "ray.no-job-server": Entry(
        "No Ray job server answers at this URL.",
        "Give the URL of the cluster's dashboard, for example `http://head:8265`.",
    ),
    "ray.job-refused": Entry(
        "The Ray job server rejects the job.",
        "The message gives its reason.",
    ),
    "ray.secret-variables": Entry(
        "Variables that may be secret would be readable by others in a Ray job's files.",
        "Set them on the cluster, or use a directory for runs that the cluster shares.",
    ),
    "ray.too-few-resources": Entry(
        "The Ray cluster has too few nodes, cores or GPUs, or too few became free in time.",
        "Request less, or raise option `place_timeout`.",
    ),
    "ray.node-unsuitable": Entry(
        "A node of the Ray cluster lacks a package, has a different version, or does not "
        "see the run directory.",
        "Correct what the message names for each node.",
    ),
    "ray.directory-not-shared": Entry(
        "The Ray cluster does not see the run directory.",
        "Set option `cluster_runs` to a directory that all nodes share, or to a URL.",
    ),
    "ray.code-too-large": Entry(
        "The code of the job is too large to be sent to the nodes.",
        "Keep data elsewhere, or exclude it with option `excludes`.",
    ),
    "ray.local-cluster-failed": Entry(
        "Ray could not be started on this machine.",
        "The message gives Ray's last lines. Look for other Ray processes, and check that "
        "there is enough memory.",
    ),
    "url.invalid": Entry(
        "Runs cannot be kept at this URL.",
        "Write it like `s3://bucket/runs`.",
    ),
    "url.password": Entry(
        "The URL contains a password, which others could read in the run's files.",
        "Remove the password, and set the credentials as environment variables.",
    ),
    "url.in-memory": Entry(
        "Files at `memory://` are lost when the process ends.",
        "Use a directory or another URL.",
    ),
    "url.not-found": Entry(
        "The bucket or directory of the URL does not exist.",
        "Create it, or correct the URL.",
    ),
    "url.no-access": Entry(
        "The service at the URL denies access.",
        "Set the credentials as environment variables, as the message explains.",
    ),
    "url.unreachable": Entry(
        "The service at the URL does not answer.",
        "Check the URL and the network, and try again.",
    ),
    "url.unreliable": Entry(
        "The service does not return what was written to it.",
        "Use another service, or check its settings.",
    ),
    "url.incomplete-checkpoint": Entry(
        "Files of a checkpoint at the URL are missing, or have a different size than was written.",
        "Resume from an older checkpoint. Find out what removes files there.",
    ),
    "url.secret-in-job-file": Entry(
        "The job file contains the value of a secret variable, which would be stored at the URL.",
        "Remove the value from the job file, and give it with `--env NAME`.",
    ),
    "node.no-node-rank": Entry(
        "The agent does not know which node it is.",
        "Start it with `--node-rank`.",
    ),
    "node.invalid-placement": Entry(
        "The agent cannot read the arguments that the launcher gave it.",
        "Start the agent through `dtrain launch`.",
    ),
    "node.no-rank": Entry(
        "A worker was started without the variables that contain its rank.",
        "Start it with torchrun, or the run with `dtrain launch`.",
    ),
    "gpu.too-few-on-node": Entry(
        "A node has fewer visible GPUs than the run needs.",
        "Check `--gpus`, the request to the cluster, and CUDA_VISIBLE_DEVICES.",
    ),
    "checkpoint.missing-manifest": Entry(
        "A checkpoint has no manifest (the list of its files), so it was not written completely.",
        "No action is needed: an older checkpoint is used.",
    ),
    "checkpoint.damaged-manifest": Entry(
        "The manifest of a checkpoint (the list of its files) is damaged.",
        "No action is needed if there is an older checkpoint. Check the disk.",
    ),
    "checkpoint.missing-file": Entry(
        "A file of a checkpoint is missing.",
        "No action is needed if there is an older checkpoint. Find out what removes files there.",
    ),
    "doctor.plan": Entry(
        "The job, the profile and the flags cannot be planned.",
        "Follow the message. It is the same as that of `dtrain plan`.",
    ),
    "doctor.versions": Entry(
        "torch is missing, or nodes have different versions of Python, torch or dtrain. Only the "
        "last part of Python's version may differ, with a warning.",
        "Install the same versions there, or use one environment on a shared file system.",
    ),
    "doctor.torch": Entry(
        "torch cannot be imported in a process of its own.",
        "Run the `python -c` line of the message, and install torch again if it fails.",
    ),
    "doctor.task": Entry(
        "The task cannot be imported, or a module that its files import is missing on a node.",
        "Correct the file at the line of the message, or install the module there.",
    ),
    "doctor.code": Entry(
        "The Python files of the job or of dtrain differ between nodes.",
        "Copy the code to the node of the message, or keep it on a shared file system.",
    ),
    "doctor.data": Entry(
        "A path of `data.paths` is missing, empty or not readable on a host.",
        "Copy or mount the data there, change its permissions, or correct `data.paths`.",
    ),
    "doctor.cores": Entry(
        "A host grants fewer cores, by its affinity or the quota of its control group, than its "
        "ranks have threads. It is a warning: they take turns.",
        "Use fewer processes, or request more CPUs for each node.",
    ),
    "doctor.numa": Entry(
        "The cores that are bound are on another NUMA node than a GPU. It is a warning: copies to "
        "that GPU are slower.",
        "Bind the ranks to the cores of their GPUs, as the message shows.",
    ),
    "doctor.gpus": Entry(
        "A host shows fewer GPUs than were asked for, or they are already in use.",
        "Use fewer with `--gpus`, correct CUDA_VISIBLE_DEVICES, or end the other program.",
    ),
    "doctor.driver": Entry(
        "The driver of the GPUs is older than the major version of CUDA for which torch is built, "
        "or torch is built for the CPU alone.",
        "Update the driver, or install a torch for the CUDA that the driver supports.",
    ),
    "doctor.shm": Entry(
        "/dev/shm has little room: loader processes send batches through it, and NCCL uses it. "
        "Up to 64 MB, the default of a container, is a problem; up to 1 GB is a warning.",
        "Make it larger, in a container with `--shm-size`, or use fewer loader processes.",
    ),
    "doctor.ulimits": Entry(
        "A limit of this account is too low for the ranks: open files, processes, address space, "
        "or locked memory for InfiniBand.",
        "Raise it with `ulimit`, or in the settings of the container or the batch system.",
    ),
    "doctor.disk": Entry(
        "The disk of the run's directory is not writable, or has less room than a checkpoint "
        "takes. Below the room for all checkpoints that are kept, it is a warning.",
        "Free space there, or choose another directory with `--runs`.",
    ),
    "doctor.fsync": Entry(
        "It takes over 50 ms to write a few bytes safely to the disk of the run's directory. It is "
        "a warning: each checkpoint does it several times.",
        "Choose a faster disk with `--runs`.",
    ),
    "doctor.shared": Entry(
        "The nodes of a launch do not write to the same directory.",
        "Choose a directory on a file system that all nodes share, with `--runs`.",
    ),
    "doctor.names": Entry(
        "A host cannot resolve its own name or that of another node, or its name servers take "
        "over 1 s. It is a warning: dtrain uses addresses, but torch asks for names.",
        "Add the name to the name server or to /etc/hosts, or set RES_OPTIONS as shown.",
    ),
    "doctor.interface": Entry(
        "A variable such as GLOO_SOCKET_IFNAME names an interface that the host does not have.",
        "Remove the variable. dtrain sets it to the interface that leads to the head.",
    ),
    "doctor.ports": Entry(
        "A host cannot be reached on a port that it has opened: a firewall is in between.",
        "Allow all TCP ports between the nodes. torch uses any of them.",
    ),
    "doctor.clock": Entry(
        "The clock of a node is over 1 s away from that of the head (a warning), or over 60 s "
        "(a problem). Before a launch: no NTP keeps the clock.",
        "Run `timedatectl set-ntp true` on each host.",
    ),
    "doctor.slurm": Entry(
        "Slurm does not answer, would refuse the job, or has too few nodes that are up.",
        "Follow Slurm's reason in the message; the option it is about is named.",
    ),
    "doctor.ray": Entry(
        "The Ray cluster does not answer, or never has what the job asks for.",
        "Correct the address, ask for less, or add nodes.",
    ),
    "doctor.answer": Entry(
        "A node has not answered its checks within 30 s.",
        "Look at that host: a disk or a name server that hangs stops every process.",
    ),
    "failure.exception": Entry(
        "A worker raised a Python exception.",
        "Read the lines of your code that the verdict shows.",
    ),
    "failure.exit": Entry(
        "A worker exited with a status other than 0.",
        "Look in its log for the call of `exit`.",
    ),
    "failure.signal": Entry(
        "A worker was killed by a signal.",
        "Find out what sent it: the cluster, an administrator, or a crash in a library.",
    ),
    "failure.out-of-memory": Entry(
        "The system killed a worker because the memory was used up.",
        "Ask for more memory, or make `micro_batch_size` or `data.workers` smaller.",
    ),
    "failure.node-missing": Entry(
        "A node did not join in time.",
        "Check that its agent was started and that it can reach the first node.",
    ),
    "failure.node-lost": Entry(
        "A node stopped answering during the run.",
        "Check that host, then resume the run.",
    ),
    "failure.agent": Entry(
        "The agent of a node, or the launcher, failed.",
        "The message gives the reason.",
    ),
    "failure.collectives-differ": Entry(
        "One rank called different collectives than all other ranks.",
        "Look for a branch in your code that only this rank takes.",
    ),
    "failure.collectives-undecided": Entry(
        "Ranks called different collectives, and no majority shows which is right.",
        "Look for a branch before the shown lines that only some ranks take.",
    ),
    "failure.rank-absent": Entry(
        "A rank did not reach a collective before the other ranks timed out.",
        "Look at the line where it was: it may be slow, or wait for something else.",
    ),
    "failure.early-exit": Entry(
        "A rank exited before the end of the training, while the others waited for it.",
        "Leave the loop in the same step on all ranks.",
    ),
    "failure.timeout": Entry(
        "All ranks waited for one another until the collective timed out.",
        "Look for a collective that not all ranks call, and at the network between them.",
    ),
    "verify.run-failed": Entry(
        "A run of the comparison failed.",
        "Read its verdict below the line.",
    ),
    "verify.reference-failed": Entry(
        "The job already fails as one process, so nothing can be compared.",
        "Make the job run with `dtrain launch --procs 1` first.",
    ),
    "verify.nothing-recorded": Entry(
        "The job trained, but it recorded nothing that could be compared.",
        "Use trainer native, or train for at least one step.",
    ),
    "verify.nothing-to-compare": Entry(
        "None of the chosen combinations can be run.",
        "Choose others; the message gives the reason for each.",
    ),
    "verify.fp64-failed": Entry(
        "A layout differs, but it cannot be run in fp64 to show whether rounding is the cause.",
        "Make the task run in fp64: create tensors in the default dtype.",
    ),
    "verify.script": Entry(
        "`dtrain verify` compares tasks, but a script has its own training loop.",
        "Write the training as a task.",
    ),
    "verify.sharded-stream": Entry(
        "A stream that shards itself gives one process a different order than several processes.",
        "Compare with `data.stream: same`.",
    ),
    "verify.trainer-unsuitable": Entry(
        "The task belongs to a framework that the chosen trainer cannot train.",
        "Choose the trainer that the message names.",
    ),
    "verify.no-directory": Entry(
        "The runs of the comparison cannot be written anywhere.",
        "Give a directory with `--keep`.",
    ),
    "verify.stopped": Entry(
        "The comparison was stopped before its end.",
        "Run it again.",
    ),
    "verify.other-samples": Entry(
        "A different number of processes trains on different samples, or in a different order.",
        "Draw every choice of samples from the seed and the step, never from the rank.",
    ),
    "verify.other-start": Entry(
        "Processes begin with different parameter values.",
        "Do not seed by rank in `model()`, and use no random generator of your own there.",
    ),
    "verify.other-model": Entry(
        "Processes build different models.",
        "Build the same model in every process.",
    ),
    "verify.other-loss": Entry(
        "The loss of a sample depends on the process that computes it.",
        "Compute the loss from the sample alone.",
    ),
    "verify.other-gradient": Entry(
        "The gradient is not the gradient of the whole batch.",
        "Return sums with weights, and leave the division to dtrain.",
    ),
    "verify.other-learning-rate": Entry(
        "The learning rate depends on something other than the number of optimizer steps.",
        "Compute it only from the number of optimizer steps.",
    ),
    "verify.other-updates": Entry(
        "There are more or fewer updates than global batches, or an update uses a "
        "different gradient.",
        "Let the loop call the optimizer, once for each global batch.",
    ),
    "verify.state-outside-checkpoint": Entry(
        "The task keeps something that changes during the training and is not in the checkpoint.",
        "Keep it in the model's buffers or in the task's state.",
    ),
    "verify.batch-norm": Entry(
        "BatchNorm normalises over the samples of each process, not over the whole batch.",
        "Use a norm over features, SyncBatchNorm on GPUs, or strategy exact.",
    ),
    "verify.compiled-differs": Entry(
        "With `train.compile`, the training differs from the same one that is not compiled by more "
        "than rounding.",
        "Leave `train.compile` out, and report the difference to PyTorch, or find the layer with "
        "TORCH_LOGS=graph_code.",
    ),
    "verify.clipping-order": Entry(
        "Gradients are clipped before they are reduced.",
        "Use the job's own setting for clipping.",
    ),
    "verify.loss-scaling": Entry(
        "Gradients are used before they are divided by the scale of the loss.",
        "Leave loss scaling and autocast to dtrain.",
    ),
    "verify.replicas-differ": Entry(
        "Ranks hold different parameters after a step.",
        "Write to the parameters only through the optimizer.",
    ),
    "verify.buffers-differ": Entry(
        "Ranks hold different buffers after a step.",
        "Change buffers in the same way on all ranks.",
    ),
    "verify.same-random-numbers": Entry(
        "All ranks draw the same random numbers, so their noise is the same.",
        "Do not seed again in the task.",
    ),
    "verify.evaluation-differs": Entry(
        "The evaluation does not count every sample exactly once.",
        "Return sums and counts, and leave the average to dtrain.",
    ),
    "verify.bits-differ": Entry(
        "Two runs that must give the same bits do not.",
        "Look for something that depends on time, on the launcher, or that a resume does "
        "not restore.",
    ),
    "checkpoint.none-saved": Entry(
        "The run has no checkpoint yet.",
        "Train until one is saved; `checkpoint:` in job.yaml sets when.",
    ),
    "checkpoint.not-found": Entry(
        "The run has no checkpoint of this name.",
        "Use a step that the message lists, or `best` if it is there; `dtrain checkpoint list` "
        "shows more.",
    ),
    "checkpoint.not-of-a-step": Entry(
        "`best`, and a directory that is in no run, cannot be pinned. Nothing removes them.",
        "Pin the checkpoint of a step, for example RUN:200.",
    ),
    "checkpoint.none-intact": Entry(
        "All checkpoints of the run are damaged, so `dtrain checkpoint prune` removes none.",
        "Restore the files from a copy. `dtrain checkpoint verify` names what is damaged.",
    ),
    "checkpoint.keep-unknown": Entry(
        "A script decides how many of its checkpoints it keeps, and `dtrain checkpoint prune` does "
        "not know that number.",
        "Give it with `--keep N`.",
    ),
    "export.file-exists": Entry(
        "The output file exists already.",
        "Choose another one with `--output`, or replace it with `--force`.",
    ),
    "export.no-space": Entry(
        "The disk is full, or a limit of its size is reached, so the file was not written.",
        "Free some space, or write to another disk with `--output`.",
    ),
    "export.cannot-write": Entry(
        "The file system reports an error when the file is written.",
        "Fix the error in the message, or write to another directory with `--output`.",
    ),
    "export.unsupported-type": Entry(
        "A tensor has a type that the format does not have, for example a complex one.",
        "Use `--to torch`, which has all types.",
    ),
    "export.torch-failed": Entry(
        "torch ended with an error when it should write the structure of the file.",
        "The message gives its reason. `--to safetensors` works without torch.",
    ),
    "export.unknown-format": Entry(
        "There is no export format of this name.",
        "Use one of the formats that the message lists.",
    ),
    "export.no-directory": Entry(
        "The directory for the output does not exist.",
        "Create it, or give another one with `--output`.",
    ),
    "export.no-checkpoint": Entry(
        "The run has no checkpoint to export.",
        "Train until one is saved; `checkpoint:` in job.yaml sets when.",
    ),
    "export.no-such-step": Entry(
        "The run has no checkpoint of this step.",
        "Use one of the steps that the message lists.",
    ),
    "export.no-usable-checkpoint": Entry(
        "All checkpoints of the run are damaged.",
        "Restore the files from a copy. The message names the damage of each checkpoint.",
    ),
    "export.no-average": Entry(
        "The checkpoint holds no average of the model.",
        "Train with `dtrain.EMA`, or leave out `--averaged`.",
    ),
    "export.script-format": Entry(
        "The run trained a script, and dtrain knows only the parameters of its model.",
        "Use `--to safetensors`.",
    ),
    "export.not-keras": Entry(
        "The model is not a Keras model.",
        "Use `--to torch-export`, which takes other models.",
    ),
    "export.no-single-call": Entry(
        "The task calls parts of the model, so there is no single call to export.",
        "Call the model itself in the task, or use `--to safetensors`.",
    ),
    "export.model-unsupported": Entry(
        "The exporter cannot write this model.",
        "The message gives its reason. `--to safetensors` writes the parameters of any model.",
    ),
    "export.outputs-differ": Entry(
        "The exported model gives different outputs than the model, so it was not kept.",
        "Look for code in the model that depends on Python values or on randomness.",
    ),
    "export.changed-when-read-back": Entry(
        "A file has different contents when it is read back after writing.",
        "Check the disk, and export again.",
    ),
    "api.invalid-argument": Entry(
        "A function of dtrain was called with an argument that it does not take.",
        "Use the arguments that the message names.",
    ),
    "api.value-not-for-jobs": Entry(
        "A value was given that cannot be written to a job file.",
        "Give numbers, texts, lists and dicts, and create other objects inside the task.",
    ),
    "api.class-needs-notebook": Entry(
        "The task uses a value of the notebook that workers cannot receive.",
        "Create the value inside the class, or move it into a file and import it.",
    ),
    "api.class-without-source": Entry(
        "The class has no source text that workers could import.",
        "Move the class into a file, and import it from there.",
    ),
    "api.class-not-importable": Entry(
        "Workers cannot import the class by its name.",
        "Define it at the top of a file or of a cell.",
    ),
    "api.main-thread-only": Entry(
        "The function handles Ctrl-C, so it works in the main thread only.",
        "Call it in the main thread.",
    ),
    "api.launch-at-import": Entry(
        "Each worker imports this file, and would then launch another run.",
        'Put the call under `if __name__ == "__main__":`.',
    ),
}
