"""Codes of the training plane: tasks, data, checks, checkpoints, integrations."""

from __future__ import annotations

from collections.abc import Mapping

from dtrain.codes.entry import Entry

_TASK = {
    "task.bad-arguments": Entry(
        "The values under args in the job are not those that the task's class or function takes.",
        "Correct the names under args, or give the arguments in the class a default.",
    ),
    "task.bad-callbacks": Entry(
        "callbacks() does not return a list, or the list holds something that is not a callback of "
        "dtrain or of the framework that the task uses.",
        "Return a list of objects of classes that derive from dtrain.Callback.",
    ),
    "task.bad-state": Entry(
        "state_dict() of the task does not return a dict.",
        "Return a dict of tensors, numbers, strings and containers of these.",
    ),
    "task.incomplete-state": Entry(
        "The task has one of the methods state_dict() and load_state_dict(), but not the other.",
        "Write both methods, or remove the one that is there.",
    ),
    "task.lazy-layer": Entry(
        "The model has a lazy layer, for example LazyLinear. Its parameters have no shape before "
        "the first batch, but the optimizer needs them earlier.",
        "Call the model once on zeros at the end of model(), or give the layer its input size.",
    ),
    "task.log-not-a-number": Entry(
        "session.log() of a callback received a value that cannot be converted to a float.",
        "Log a number or a tensor with one element.",
    ),
    "task.loss-not-scalar": Entry(
        "loss() or a metric of evaluate() is not a tensor with one element, not a number and not a "
        "Loss of such values.",
        "Return the mean over the batch as a scalar tensor, or Loss(sum, weight).",
    ),
    "task.loss-weights-zero": Entry(
        "The sum of the weights of all Loss objects in one step, on all ranks together, is not "
        "positive. The loss is divided by this sum.",
        "Return positive weights, or remove samples without weight from the data set.",
    ),
    "task.loss-without-graph": Entry(
        "The tensor that loss() returns does not require a gradient, for example because it is "
        "detached, computed under no_grad, or of a frozen model.",
        "Compute the loss from the outputs of the model, without detach(), item() or no_grad().",
    ),
    "task.model-wrapped": Entry(
        "model() returns a model that is already wrapped in DistributedDataParallel, DataParallel "
        "or FSDP. dtrain wraps it itself.",
        "Return the bare model, and choose the strategy in the job: ddp, fsdp or dp.",
    ),
    "task.not-a-model": Entry(
        "model() does not return a torch.nn.Module.",
        "Return an object of a class that derives from torch.nn.Module.",
    ),
    "task.not-a-scheduler": Entry(
        "scheduler() does not return a scheduler of torch.optim.lr_scheduler.",
        "Return a scheduler, or None.",
    ),
    "task.not-an-optimizer": Entry(
        "optimizer() does not return a torch.optim.Optimizer.",
        "Return an optimizer over parameters of the model that the method receives.",
    ),
    "task.nothing-to-train": Entry(
        "No parameter of the model requires a gradient.",
        "Build a model with parameters, or call requires_grad_() on the parameters to train.",
    ),
    "task.optimizer-foreign-parameters": Entry(
        "The optimizer holds parameters that are not in the model. Their gradients would not be "
        "reduced between ranks, and a checkpoint would have no name for their state.",
        "Make the parameters a part of the model in model(), and give the optimizer parameters of "
        "the model that optimizer(model) receives.",
    ),
    "task.optimizer-needs-closure": Entry(
        "step() of the optimizer needs a closure that computes the loss again, for example LBFGS. "
        "dtrain computes one gradient for each step.",
        "Use an optimizer whose step() needs no argument, for example AdamW or SGD.",
    ),
    "task.plateau-scheduler": Entry(
        "scheduler() returns ReduceLROnPlateau, which is stepped with a metric. dtrain steps the "
        "scheduler after each optimizer step, without a metric.",
        "Use a scheduler that counts steps.",
    ),
    "task.scheduler-of-other-optimizer": Entry(
        "The scheduler belongs to a different optimizer than the one of this training, so the "
        "learning rate would never change.",
        "Make the scheduler for the optimizer that scheduler(optimizer) receives.",
    ),
    "task.scheduler-too-short": Entry(
        "The scheduler is made for fewer steps than the training has, and torch raises an error "
        "after the last of them. It is stepped once after each global batch.",
        "Make it for the number of steps of the training.",
    ),
    "task.several-optimizers": Entry(
        "optimizer() returns several optimizers. A task has one.",
        "Return one optimizer with several groups of parameters, each with its own options.",
    ),
}

_DATA = {
    "data.bad-order": Entry(
        "sample_order() does not return ids of samples in train_dataset(): it returns none, "
        "something that is no sequence of integers, or an id that is out of range.",
        "Return a sequence of integers from 0 to the length of the data set minus 1, or an object "
        "with __len__ and block(start, stop).",
    ),
    "data.bad-weights": Entry(
        "sample_weights() does not return one finite number, 0 or more, for each sample, or all of "
        "them are 0.",
        "Return as many weights as train_dataset() has samples, with at least one above 0.",
    ),
    "data.empty": Entry(
        "A data set has no samples.",
        "Check the path and the filter of the data set.",
    ),
    "data.file-position-shared": Entry(
        "The data set opened a file before the loader processes were forked, and reads from it in "
        "__getitem__. All processes share one position in that file, so they read wrong bytes.",
        "Open the file in __getitem__ when the process has not opened it yet, read it by np.memmap "
        "or os.pread, or set data.workers: 0.",
    ),
    "data.loader-process-ended": Entry(
        "A loader process ended unexpectedly, for example because the system ran out of memory or "
        "a library crashed. The message names the sample that it was reading.",
        "Read the log of that rank. Use fewer data.workers if memory was short, or set "
        "data.workers: 0 to see the error in the rank itself.",
    ),
    "data.no-positions": Entry(
        "The data set has no __len__ or no __getitem__, but both are needed here.",
        "Write both methods, or return a data set that can only be iterated, with __iter__, from "
        "train_dataset().",
    ),
    "data.not-a-data-set": Entry(
        "train_dataset() or eval_dataset() returns something from which no samples can be taken, "
        "for example None, a path, a DataLoader, a class or an iterator that works only once.",
        "Return an object with __len__ and __getitem__, or one whose __iter__ starts from the "
        "beginning each time.",
    ),
    "data.not-exactly-once": Entry(
        "The ranks did not read each sample of the order exactly once. The likely cause is a data "
        "set or a loader that reads other samples than those requested.",
        "Find what changes the samples in the steps and on the ranks that the message names. No "
        "checkpoint contains these steps.",
    ),
    "data.not-same-on-ranks": Entry(
        "train_dataset() or its order is not the same on all ranks: its length, its fingerprint or "
        "a sample differs.",
        "Make all nodes read the same files, and do not use the rank in the data set. dtrain gives "
        "each rank its own part.",
    ),
    "data.order-length-changes": Entry(
        "sample_order() returns a different number of ids for a later epoch than for the first "
        "one.",
        "Return the same number of ids for each epoch.",
    ),
    "data.order-of-stream": Entry(
        "The task has sample_order() or sample_weights(), but its training data can only be "
        "iterated.",
        "Remove the method, or return a data set with __len__ and __getitem__.",
    ),
    "data.ranks-out-of-step": Entry(
        "The ranks were not at the same position of the data in one step. This is an error in "
        "dtrain or in code that changes its loaders.",
        "Remove the code that changes dtrain's loaders. If there is none, report this error as a "
        "bug in dtrain.",
    ),
    "data.sample-seed-needs-id": Entry(
        "sample_seed() or sample_rng() is called without an id in __getitems__(), which reads "
        "several samples at once.",
        "Pass the id of the sample: sample_seed(id).",
    ),
    "data.stream-not-sharded": Entry(
        "The job has data.stream: sharded, but several ranks read mostly the same samples.",
        "Remove data.stream: sharded, so that dtrain distributes the samples, or let the data set "
        "shard itself by the rank.",
    ),
    "data.stream-of-map-style": Entry(
        "The job sets data.stream, which is for data sets that can only be iterated. This one has "
        "__len__ and __getitem__, so dtrain distributes its samples.",
        "Remove data.stream from the job, and the code that shards the data set by the rank.",
    ),
    "data.streams-differ": Entry(
        "train_dataset() can only be iterated, and it gives the ranks different samples, or the "
        "same samples in a different order.",
        "Remove the code that shards or shuffles by the rank or the loader process. If the data "
        "set shards itself on purpose, set data.stream: sharded.",
    ),
    "data.too-few-samples": Entry(
        "There are fewer samples in a step, or in the data set, than processes.",
        "Use a larger global batch size or fewer processes.",
    ),
    "data.two-orders": Entry(
        "The task has sample_order() and sample_weights(), but only one of them can decide the "
        "order.",
        "Remove one of the two methods.",
    ),
    "data.weights-without-shuffle": Entry(
        "The task has sample_weights(), which draws samples at random, but data.shuffle is false.",
        "Remove sample_weights(), or remove data.shuffle: false.",
    ),
    "data.wrong-number-of-samples": Entry(
        "__getitems__() of the data set returns more or fewer samples than it received ids.",
        "Return one sample for each id, in the same order.",
    ),
}

_EVALUATION = {
    "eval.metrics-differ": Entry(
        "evaluate() returns a metric on some ranks only.",
        "Return the same names for each batch. Return Loss(sum, weight=0) where a batch has no "
        "value for one of them.",
    ),
    "eval.no-data": Entry(
        "The job watches a metric of evaluations, but the task has no data for evaluation.",
        "Write eval_dataset() in the task, or remove train.early_stopping and checkpoint.best.",
    ),
    "eval.no-such-metric": Entry(
        "The job watches a metric that the evaluation does not return.",
        "Use one of the names that the message lists.",
    ),
    "eval.not-metrics": Entry(
        "evaluate() does not return a dict.",
        "Return a dict from names of metrics to numbers, scalar tensors or Loss objects.",
    ),
    "predict.files-not-shared": Entry(
        "Rank 0 does not see the predictions that another rank wrote, so the nodes do not share "
        "the run directory.",
        "Put the runs into a directory on a file system that all nodes share.",
    ),
    "predict.not-rows": Entry(
        "predict() does not return tensors with one row for each sample of the batch.",
        "Return one tensor, or a dict of tensors by name, whose first dimension is the samples.",
    ),
    "predict.rows-differ": Entry(
        "predict() returns other names, types or shapes of rows for one batch than for another.",
        "Return rows of the same type and shape for each batch, for example by padding them.",
    ),
    "ema.bad-argument": Entry(
        "dtrain.EMA received arguments that it cannot use: its first one is not a model, or the "
        "decay is not a number from 0 to 1.",
        "Write dtrain.EMA(model, 0.999), or dtrain.EMA(decay=0.999) in callbacks().",
    ),
    "ema.cannot-copy": Entry(
        "dtrain.EMA needs a copy of the model, but copy.deepcopy() does not make a complete one.",
        "Make the model copyable by copy.deepcopy(), or do not use dtrain.EMA.",
    ),
    "ema.needs-whole-weights": Entry(
        "dtrain.EMA averages whole parameters, but strategy 'fsdp' shards them.",
        "Use strategy 'ddp' or 'exact'.",
    ),
    "ema.no-model-yet": Entry(
        "The averaged model of a dtrain.EMA(decay=…) was used before the training began.",
        "Pass the model: dtrain.EMA(model, decay). Or use the average after the training began.",
    ),
    "ema.of-other-model": Entry(
        "The task keeps a dtrain.EMA of a module that is not part of the trained model, so the "
        "average would never change.",
        "Make the dtrain.EMA of the model that model() returns, or of a part of it.",
    ),
    "ema.part-of-model": Entry(
        "callbacks() returns a dtrain.EMA of a part of the model, but an evaluation needs the "
        "whole model.",
        "Keep that dtrain.EMA as an attribute of the task, and do not return it from callbacks().",
    ),
    "ema.several": Entry(
        "callbacks() returns several dtrain.EMA, but only one can be evaluated.",
        "Return one of them, and keep the others as attributes of the task.",
    ),
}

_CHECKS = {
    "check.gradient-too-large": Entry(
        "Each element of the gradient is finite, but its norm is not, so it cannot be clipped.",
        "Lower the learning rate or scale the loss down, and look for the parameter that grows.",
    ),
    "check.initial-values-differ": Entry(
        "model() gives parameters or buffers different initial values on some ranks, although all "
        "ranks have the same seed.",
        "Draw initial values from the generators of torch, NumPy or Python, and not from the rank "
        "or the time. Or set checks.init: broadcast to use the values of rank 0.",
    ),
    "check.model-differs": Entry(
        "model() builds a different model on some ranks: names, shapes, types or their order "
        "differ.",
        "Build the same model on each rank. It must not depend on the rank or the node.",
    ),
    "check.not-finite": Entry(
        "A loss or a gradient is NaN or infinite. The message names the rank, the micro-batch and "
        "the sample, if they can be found.",
        "Look at that sample, lower the learning rate, or clip gradients with "
        "train.clip_grad_norm. With checks.on_nan: skip, such steps are skipped.",
    ),
    "check.optimizer-differs": Entry(
        "optimizer() builds a different optimizer on some ranks: its class, groups or options "
        "differ.",
        "Build the same optimizer on each rank. It must not depend on the rank or the node.",
    ),
    "check.programs-differ": Entry(
        "The ranks do not run the same program: the version of torch or Python, the file of the "
        "task or the seed differs.",
        "Install the same versions on all nodes, and make them read the same code.",
    ),
    "check.replicas-differ": Entry(
        "Something that must be equal on all ranks is not: parameters, gradients, the state of the "
        "optimizer, the learning rate or the order of collectives. The message names the rank and "
        "the first element that differs.",
        "Look for code that changes the model on some ranks only, and for random numbers that are "
        "not seeded. If no code does, test the memory of the node that the message names.",
    ),
    "check.state-not-finite": Entry(
        "A parameter, a buffer or the state of the optimizer is NaN or infinite when a checkpoint "
        "is due. The checkpoint is not written.",
        "Look for the update or the forward that made it so, for example BatchNorm statistics or "
        "a learning rate that is too high. Earlier checkpoints are intact.",
    ),
    "check.too-many-skipped": Entry(
        "The loss or gradient was not finite in more steps in a row than checks.max_skipped.",
        "The message names the last cause. Resume from an earlier checkpoint, for example with a "
        "lower learning rate.",
    ),
    "inject.impossible": Entry(
        "The fault of --inject cannot be injected in this training: there is no such tensor, "
        "element or bit, or it would change nothing.",
        "Choose a tensor, an element or a step that the message names as possible.",
    ),
    "inject.never-made": Entry(
        "The training ended before the fault of --inject was injected.",
        "Choose an earlier step, or a kind of fault that occurs in this training.",
    ),
}

_CHECKPOINTS = {
    "checkpoint.bad-position": Entry(
        "The checkpoint contains an impossible position in the data.",
        "Resume from an earlier checkpoint: move this one away.",
    ),
    "checkpoint.cannot-write": Entry(
        "A checkpoint cannot be written, for example because the directory is read-only or the "
        "file system failed. Earlier checkpoints are intact.",
        "Make the directory in the message writable for the job, then resume.",
    ),
    "checkpoint.copy-differs": Entry(
        "The bytes to be written to a checkpoint are not those of the tensor in the training. They "
        "are compared by a digest, before the checkpoint is complete. Probably memory is faulty.",
        "Test the memory of this host. The earlier checkpoints are intact.",
    ),
    "checkpoint.damaged-file": Entry(
        "The content of a checkpoint file is not what was written.",
        "If an earlier checkpoint is intact, dtrain uses that one. Test the disk, or restore the "
        "file from a copy.",
    ),
    "checkpoint.init-bad-index": Entry(
        "An index of several files with weights (*.index.json) is damaged, or a file that it names "
        "is missing or is not in the directory of the index.",
        "Copy or download the directory again, with all its files.",
    ),
    "checkpoint.init-differs": Entry(
        "checkpoint.init_from names weights that do not fit the model. The message lists the names "
        "that only one of the two has, and those with other shapes.",
        "Change the arguments of the model, or set checkpoint.init_strict: false to use what fits.",
    ),
    "checkpoint.init-no-match": Entry(
        "No tensor that checkpoint.init_from names has the name and the shape of a tensor of the "
        "model.",
        "Compare the names in the message, and use the weights of this kind of model.",
    ),
    "checkpoint.init-none-intact": Entry(
        "checkpoint.init_from names a run, but none of its checkpoints is complete and intact.",
        "Name another run, or one of its checkpoints that you have restored from a copy.",
    ),
    "checkpoint.init-not-found": Entry(
        "checkpoint.init_from names a path that does not exist on a host, or a run without a "
        "checkpoint.",
        "Check the path; it is relative to job.yaml, and must exist on all hosts.",
    ),
    "checkpoint.init-other-format": Entry(
        "checkpoint.init_from names something that does not contain weights in a format that "
        "dtrain reads.",
        "Name a run or a checkpoint of dtrain, a file of safetensors, a directory of Hugging Face, "
        "or a file that torch.save wrote from a state_dict.",
    ),
    "checkpoint.init-unreadable": Entry(
        "A file with weights is damaged or incomplete, or does not have the format that its name "
        "shows.",
        "Copy or download the file again.",
    ),
    "checkpoint.init-unsafe": Entry(
        "The file contains objects of other classes than tensors and plain values, so that loading "
        "it could run any code. dtrain never does that.",
        "If you trust the file, load it yourself, and write the state_dict alone to a new file.",
    ),
    "checkpoint.no-space": Entry(
        "The disk is full, or a quota is reached, so a checkpoint cannot be written. Earlier "
        "checkpoints are intact.",
        "Free some space, or write less with checkpoint.keep and checkpoint.every_steps. Then "
        "resume.",
    ),
    "checkpoint.none-loads": Entry(
        "The run has checkpoints, but none of them can be used. The message lists the reasons. "
        "dtrain does not start again at step 0, because this would hide the problem.",
        "Fix the cause, for example by resuming with the same model. To start again at step 0, "
        "move the checkpoints away.",
    ),
    "checkpoint.other-data": Entry(
        "The checkpoint was made with different data, or with a different order of the data, so "
        "its position does not apply.",
        "Resume with the same data, seed and data.shuffle, or launch a new run.",
    ),
    "checkpoint.other-format": Entry(
        "The checkpoint was written by a version of dtrain that has another format.",
        "Resume with that version of dtrain.",
    ),
    "checkpoint.other-groups": Entry(
        "The parameter groups of the optimizer in the checkpoint are not those of this optimizer.",
        "Make the same parameter groups in optimizer(), or launch a new run.",
    ),
    "checkpoint.other-model": Entry(
        "The names or shapes of parameters or buffers in the checkpoint differ from those of the "
        "model.",
        "Resume with the code and args that built the model of the checkpoint, or launch a new "
        "run.",
    ),
    "checkpoint.part-of-tensor": Entry(
        "The state to be saved contains one rank's shard of a tensor that strategy 'fsdp' has "
        "sharded.",
        "Leave the model's own parameters out of the state. For a copy of a parameter, save the "
        "result of full_tensor(), which all ranks must call together.",
    ),
    "checkpoint.ranks-differ": Entry(
        "The names, types or shapes of the tensors to be saved are not the same on all ranks, for "
        "example because the optimizer of one rank has state for another parameter.",
        "Make the ranks do the same. With checks.every_steps, they are compared before this.",
    ),
    "checkpoint.state-missing": Entry(
        "The checkpoint contains no state for an object that must be restored.",
        "Resume with the objects that existed when it was saved, or launch a new run.",
    ),
    "checkpoint.state-refused": Entry(
        "load_state_dict() of an object raises an error for the state in the checkpoint. Probably "
        "its code or its settings have changed since it was saved.",
        "Resume with the old code, or let load_state_dict() accept the older state.",
    ),
    "checkpoint.unreadable-file": Entry(
        "The file system reports an error when a file of a checkpoint is read.",
        "Fix the error in the message, for example missing permissions or a file system that is "
        "not mounted.",
    ),
    "checkpoint.unsaveable-key": Entry(
        "A dict in the state to be saved has a key that is neither str nor int.",
        "Use keys of these types in state_dict().",
    ),
    "checkpoint.unsaveable-value": Entry(
        "The state to be saved contains an object that a checkpoint cannot hold, for example a "
        "set, a sparse tensor or an object of a class of the task.",
        "Save tensors, NumPy arrays, numbers, str and None, in dicts, lists and tuples.",
    ),
    "checkpoint.writer-ended": Entry(
        "The process that writes the checkpoints of a rank has ended, for example because the host "
        "has no memory left. The checkpoint that it was writing is lost.",
        "If memory is short, set checkpoint.staging: 0, so that no copy of the state is made.",
    ),
    "checkpoint.wrong-directory": Entry(
        "The step of the checkpoint is not the step in the name of its directory. Probably the "
        "directory was renamed or copied.",
        "Rename the directory to the step of the checkpoint, or move it away.",
    ),
    "resume.settings-changed": Entry(
        "The job or the task now gives the optimizer or the scheduler different settings, but the "
        "training has changed these settings since its start, so neither the old nor the new "
        "value would be right.",
        "Resume with the old settings, which the message shows, or launch a new run.",
    ),
}

_STRATEGIES = {
    "strategy.batch-cannot-be-cut": Entry(
        "Strategy 'dp' splits each batch between the devices, but the batch holds something that "
        "is not a tensor with one row for each sample.",
        "Return tensors with the samples first from collate(), or use strategy 'ddp'.",
    ),
    "strategy.batch-cannot-be-lent": Entry(
        "A rank has no sample in a step and borrows a batch of another rank, but the batch holds "
        "objects that cannot be sent between ranks.",
        "Return a dict of tensors from collate(), or make the global batch at least as large as "
        "the number of processes.",
    ),
    "strategy.buffer-changes-shape": Entry(
        "A forward changes the shape of a buffer. Strategy 'exact' cannot combine such a buffer "
        "over its virtual shards.",
        "Do not store values whose shape depends on the batch in a buffer.",
    ),
    "strategy.mixed-types": Entry(
        "Strategy 'fsdp' needs one dtype for all trainable parameters of a block of the model.",
        "Give the parameters one dtype, for example by model.float(), or use strategy 'ddp'.",
    ),
    "strategy.no-blocks": Entry(
        "`train.activation_checkpointing: true` means the blocks of the model, but it has none: no "
        "ModuleList or Sequential holds its layers.",
        "Name the classes of the modules instead, for example [Block].",
    ),
    "strategy.no-compiler": Entry(
        "torch.compile makes code that a compiler of the system must translate, and there is none.",
        "Install a C++ compiler (g++) and the headers of Python (python3-dev) on the machines that "
        "train, or name a compiler with the variable CXX; on GPUs, install triton. Or leave "
        "`train.compile` out.",
    ),
    "strategy.no-such-class": Entry(
        "`fsdp.wrap` or `train.activation_checkpointing` names a class of which the model has no "
        "module with parameters.",
        "Use the names that the message lists.",
    ),
    "strategy.one-process-only": Entry(
        "The strategy trains in one process, but several were started.",
        "Use strategy 'ddp', or start one process.",
    ),
    "strategy.scalar-parameter": Entry(
        "A parameter is a scalar, which strategy 'fsdp' cannot shard.",
        "Give the parameter one dimension, or use strategy 'ddp'.",
    ),
    "strategy.sparse-gradients": Entry(
        "A layer makes sparse gradients, which the strategy does not reduce.",
        "Build the layer with sparse=False, or use strategy 'single'.",
    ),
    "strategy.sync-batch-norm": Entry(
        "The model has SyncBatchNorm, which needs all processes at once. Strategy 'exact' computes "
        "one virtual shard at a time.",
        "Use BatchNorm with strategy 'exact', or use strategy 'ddp'.",
    ),
}

_KERAS = {
    "keras.calls-no-forward": Entry(
        "`train.compile` and `train.activation_checkpointing` change the forward of torch modules, "
        "but Keras calls its layers in its own way.",
        "Leave the setting out, or write the model with torch.",
    ),
    "keras.callback-unsupported": Entry(
        "A callback of Keras cannot do in dtrain what it does in model.fit.",
        "Use the field of the job or the callback that the message names.",
    ),
    "keras.class-weight": Entry(
        "class_weight is given for data for which model.fit does not accept it.",
        "Give a weight for each sample as the third part of the data.",
    ),
    "keras.compile-argument": Entry(
        "model.compile() has an argument that only model.fit uses.",
        "Remove the argument.",
    ),
    "keras.fit-argument": Entry(
        "The function returns an argument of model.fit that dtrain does not support.",
        "Set the field of the job that the message names, and remove the argument.",
    ),
    "keras.loss-reduction": Entry(
        "A loss of the model is not a mean over samples, so it would depend on how many processes "
        "share a batch.",
        "Use reduction='sum_over_batch_size', which is the default.",
    ),
    "keras.metric-not-additive": Entry(
        "A metric of Keras has variables that cannot be added up over the parts of a batch, for "
        "example a maximum, so it cannot be computed from the parts of several processes.",
        "Keep sums over samples in its variables, and divide in result(). Or write predict(), and "
        "compute the metric from predictions.npz.",
    ),
    "keras.no-data": Entry(
        "The function returns a Keras model, but no data to train on.",
        "Return model, {'x': x, 'y': y}: the model, and the arguments for model.fit.",
    ),
    "keras.no-length": Entry(
        "A PyDataset has no length, so no order can be computed.",
        "Give it __len__(), or return a function that makes a generator of batches.",
    ),
    "keras.no-such-monitor": Entry(
        "A callback of Keras watches a value that is not computed.",
        "Watch one of the values that the message lists. Values that begin with val_ need data for "
        "evaluation, and eval.every_epochs: 1 in the job.",
    ),
    "keras.not-compiled": Entry(
        "The model is not a keras.Model that was compiled with an optimizer and a loss.",
        "Call model.compile(optimizer=…, loss=…) before you return the model.",
    ),
    "keras.one-pass-data": Entry(
        "The data are a generator or an iterator, which can be used only once. Each process needs "
        "its own, and a new one in each epoch.",
        "Return the function that makes the generator.",
    ),
    "keras.optimizer-option": Entry(
        "The optimizer has an option that dtrain replaces: loss scaling or gradient accumulation.",
        "Remove the option, and set the field of the job that the message names.",
    ),
    "keras.other-backend": Entry(
        "Keras runs on another backend than torch. dtrain trains with torch.",
        "Leave KERAS_BACKEND unset, or give --env KERAS_BACKEND=torch.",
    ),
    "keras.own-loader": Entry(
        "A DataLoader has its own sampler or collate_fn, which dtrain would not use.",
        "Return its data set. Write sample_order() or sample_weights() for the order, and "
        "collate() for the batches, in a KerasTask.",
    ),
    "keras.split-needs-arrays": Entry(
        "validation_split is given, but the data are not arrays x and y, so they cannot be split.",
        "Give validation_data instead.",
    ),
    "keras.train-step": Entry(
        "The model has its own train_step() or training loop, and dtrain cannot do the backward "
        "and the update for it: it is no single loss, backward and update of all weights.",
        "Write compute_loss(), or a train_step() that computes one loss, calls its backward() and "
        "passes the gradients on to optimizer.apply(). Write several optimizers as a "
        "LightningModule with manual optimization, or as a script.",
    ),
    "keras.unequal-arrays": Entry(
        "The arrays of the data do not have the same number of samples.",
        "Give arrays of the same length.",
    ),
    "keras.unequal-batches": Entry(
        "The batches of a PyDataset do not have the same number of samples. Only the last may be "
        "smaller.",
        "Make all batches but the last of the same size.",
    ),
    "keras.value-not-a-metric": Entry(
        "train_step(), test_step() or compute_metrics() returns a value that is not the result of "
        "one of the model's metrics, so it cannot be combined from several processes.",
        "Keep the value in a keras.metrics.Mean that is an attribute of the model.",
    ),
}

_LIGHTNING = {
    "lightning.average-of-parts": Entry(
        "A callback keeps an average of the model, but with strategy 'fsdp' each process holds "
        "only a part of it.",
        "Use strategy 'ddp', or remove the callback.",
    ),
    "lightning.bad-optimizers": Entry(
        "configure_optimizers() returns something that Lightning does not accept.",
        "Return an optimizer, a list of them, or a dict with optimizer and lr_scheduler.",
    ),
    "lightning.checkpoint-of-other-step": Entry(
        "The checkpoint was made with dtrain's step, and this training uses Lightning's own loops.",
        "Resume with --set lightning.step=dtrain, or launch a new run.",
    ),
    "lightning.given-twice": Entry(
        "An argument under lightning.trainer and a field of the job mean the same.",
        "Remove one of them.",
    ),
    "lightning.layers-made-again": Entry(
        "A LightningModule makes its layers again in setup(), after strategy 'fsdp' has sharded "
        "those of the first call.",
        "Make them in configure_model(), or in setup() only if they do not exist yet.",
    ),
    "lightning.log-not-a-mean": Entry(
        "self.log() has a reduce_fx other than the mean. dtrain combines the values of batches "
        "and ranks into a mean.",
        "Log the mean over the batch, or an object of torchmetrics.",
    ),
    "lightning.log-of-two-loaders": Entry(
        "Two validation loaders log under one name, or with one object of torchmetrics, so their "
        "values would be mixed.",
        "Use another name, and another object of torchmetrics, for each loader.",
    ),
    "lightning.manual-optimization": Entry(
        "The module has automatic_optimization = False, and a field of the job asks for something "
        "that only Lightning's own steps do.",
        "Remove the field, and do the same in training_step().",
    ),
    "lightning.metric-on-some-ranks": Entry(
        "An object of torchmetrics was logged on some ranks only. The others had no sample to "
        "evaluate.",
        "Use at least as many samples for evaluation as processes, or fewer processes.",
    ),
    "lightning.needs-own-loops": Entry(
        "The module, its data or a callback needs Lightning's own loops: for example manual "
        "optimization, a hook of the backward, or a scheduler that follows a metric. The job "
        "asks for dtrain's step.",
        "Remove lightning.step: dtrain from the job, or change what the message names.",
    ),
    "lightning.needs-trainer": Entry(
        "The task is a LightningModule, but the job does not have trainer: lightning.",
        "Set trainer: lightning.",
    ),
    "lightning.no-batches": Entry(
        "Lightning's fit ended before its first batch.",
        "Look at limit_train_batches and at the length of the training data.",
    ),
    "lightning.no-dataloader-idx": Entry(
        "val_dataloader() returns several loaders, but validation_step() does not have the "
        "argument dataloader_idx.",
        "Add the argument dataloader_idx to validation_step(), or return one loader.",
    ),
    "lightning.no-loss": Entry(
        "training_step() does not return a loss.",
        "Return the mean over the batch as a tensor, or a dict with it under 'loss'. If the module "
        "skips batches on purpose, set lightning.step: lightning.",
    ),
    "lightning.no-such-argument": Entry(
        "The Trainer of the installed Lightning does not have an argument that is under "
        "lightning.trainer.",
        "Correct the name, or remove it.",
    ),
    "lightning.no-train-loader": Entry(
        "The module has no train_dataloader(), and the job names no data module.",
        "Write train_dataloader(), or set lightning.data_module in the job.",
    ),
    "lightning.not-a-data-module": Entry(
        "lightning.data_module names a class that is not a LightningDataModule of the package that "
        "the module uses.",
        "Derive the class from LightningDataModule, of the same package as the module.",
    ),
    "lightning.sampler-not-replaceable": Entry(
        "Lightning cannot put a DistributedSampler into a training loader, because it cannot "
        "create that loader or its sampler again.",
        "Set lightning.trainer: {use_distributed_sampler: false}, and let the loader read only "
        "the samples of its own rank.",
    ),
    "lightning.scheduler-by-epochs": Entry(
        "The scheduler is stepped by epochs, but the length of the data is not known.",
        "Return the scheduler with interval: step.",
    ),
    "lightning.trainer-refused": Entry(
        "Lightning's Trainer refuses the arguments under lightning.trainer.",
        "Change the argument that the message names.",
    ),
    "lightning.tuner-callback": Entry(
        "A callback trains the model before the training begins, and a resume could not repeat "
        "that.",
        "Run the callback with Lightning's Trainer alone, and write the value that it finds into "
        "the job.",
    ),
    "lightning.two-intervals": Entry(
        "The job has eval.every_steps and eval.every_epochs. Lightning's loops support only one "
        "of them.",
        "Remove one of the two.",
    ),
    "lightning.two-packages": Entry(
        "One process uses modules of both packages of Lightning, lightning and pytorch_lightning.",
        "Import everything from one of the two packages.",
    ),
}

_SCRIPTS = {
    "script.no-directory": Entry(
        "dtrain.checkpoint() is called outside of a run of dtrain, and without a directory.",
        "Pass a directory: dtrain.checkpoint(…, directory=…). Or launch the script with dtrain.",
    ),
    "script.accelerate-config": Entry(
        "Accelerate does not accept its config file.",
        "Write the file again with `accelerate config`, or change what the message names.",
    ),
    "script.command-not-started": Entry(
        "The program of a job with a `command` cannot be started on a node.",
        "Install it on all nodes, or give its path.",
    ),
    "script.no-process-group": Entry(
        "A function that communicates with the other processes is called before the process group "
        "exists.",
        "Call it after torch.distributed.init_process_group().",
    ),
    "script.sampler-not-stepped": Entry(
        "The script read a whole epoch from dtrain's sampler, but did not call its step() after "
        "each optimizer step.",
        "Call sampler.step() once after each optimizer step.",
    ),
}

TRAINING: Mapping[str, Entry] = {
    **_TASK,
    **_DATA,
    **_EVALUATION,
    **_CHECKS,
    **_CHECKPOINTS,
    **_STRATEGIES,
    **_KERAS,
    **_LIGHTNING,
    **_SCRIPTS,
}
