// CUDA C++ kernel text on one CPU thread: included before the unchanged text, which a host compiler then compiles.
//
// Every thread of a block is a fiber that runs until it waits for others: at a barrier of the block or in a collective
// of its warp. The order in which fibers are resumed is a choice, and a kernel without races does not see it.
//
// Not covered: dynamic shared memory, inline PTX, tensor cores, asynchronous copies, cooperative groups, spin-waits,
// weak memory order, the hardware's own approximations, speed.
#pragma once
#include "language.h"
#include "fibers.h"
#include "block.h"
#include "collectives.h"
#include "functions.h"
#include "launch.h"
