// Deliberate mistakes, by name, so that the tests can show that each one is noticed (tests/test_emulator.py).
// FD_MUTATED(name) is the constant false in every build but the emulator's, where a test may select one mistake.
#pragma once

// By family; each has a case in tests.
#define FD_ADALN_MUTATIONS(X)                                                            \
  X(kSumBarrier)        /* block_sum reads other warps' sums without waiting for them */ \
  X(kSumTurn)           /* block_sum reuses one buffer: the next sum overwrites it */    \
  X(kShortShuffle)      /* a warp sum that stops one step early */                       \
  X(kVarianceTail)      /* lanes beyond D add (0 - mean)^2 to the variance */            \
  X(kUnbiased)          /* variance divided by D - 1 */                                  \
  X(kBatchIndex)        /* modulation of the next sample */                              \
  X(kStride)            /* x read with stride 1 along D */                               \
  X(kStoreTail)         /* a vector stored beyond the end of the row */                  \
  X(kUnroundedResidual) /* the norm sees the residual before it was rounded */           \
  X(kChunkEnd)          /* a chunk adds the first token of the next one */               \
  X(kPartBarrier)       /* the second stage starts its next tile too early */            \
  X(kEarlyVector)       /* modulation requested early: the first vector's for all */     \
  X(kPairBarrier)       /* pair_sum reads other warps' sums without waiting for them */  \
  X(kPairTurn)          /* pair_sum reuses one buffer: the next sum overwrites it */     \
  X(kAheadTurn)         /* of two tokens requested ahead the second is used first */

#define FD_UPDATE_MUTATIONS(X)                                                            \
  X(kTermsBarrier) /* coefficients read before they are there */                          \
  X(kTermsReuse)   /* coefficients overwritten while still in use */                      \
  X(kUpdateTail)   /* elements after the last whole vector are forgotten */               \
  X(kNoiseBlock)   /* the second half of a vector of eight gets the noise of the first */ \
  X(kNoiseLane)    /* an element alone gets the noise of its block's first */

#define FD_GELU_MUTATIONS(X)                                       \
  X(kGeluStep) /* every vector of a thread to the first's place */ \
  X(kGeluTail) /* elements after the last whole vector are forgotten */

#define FD_ATTENTION_MUTATIONS(X)                                                             \
  X(kAttentionTileBarrier)   /* a tile of keys is used before the other threads' part came */ \
  X(kAttentionQueryBarrier)  /* likewise the queries */                                       \
  X(kAttentionPrepared)      /* queries used before they are normalised */                    \
  X(kAttentionStage)         /* the next tile overwrites the one in use */                    \
  X(kAttentionSingleStage)   /* likewise where there is room for one only */                  \
  X(kAttentionResultBarrier) /* the result overwrites operands in use */                      \
  X(kAttentionRagged)        /* keys beyond the last one have weights */                      \
  X(kAttentionRescale)       /* a new maximum does not rescale the sums */                    \
  X(kAttentionDelta)         /* the backward pass forgets delta */                            \
  X(kAttentionBackTile)      /* the backward pass uses a tile before all of it came */        \
  X(kAttentionBackResult)    /* its results overwrite operands in use */                      \
  X(kAttentionPartTail)      /* rows beyond the last count in the weights' gradients */

#define FD_HOPPER_MUTATIONS(X)                                                       \
  X(kHopperInit)        /* barriers used before they are made */                     \
  X(kHopperEmpty)       /* keys overwritten while they are read */                   \
  X(kHopperFull)        /* values read before they are there */                      \
  X(kHopperWait)        /* results touched while products run */                     \
  X(kHopperShrink)      /* sums not shrunk when the maximum grows */                 \
  X(kShortInit)         /* for up to 256 keys: barriers used before they are made */ \
  X(kShortKeysEmpty)    /* the next head's keys overwrite those in use */            \
  X(kShortValuesEmpty)  /* likewise its values */                                    \
  X(kShortQueriesEmpty) /* likewise the next queries of the group */                 \
  X(kShortKeysFull)     /* keys read before they are there */                        \
  X(kShortValuesFull)   /* likewise values */                                        \
  X(kShortWait)         /* scores touched while products run */                      \
  X(kShortRagged)       /* keys beyond the last one have weights */

#define FD_SCAN_MUTATIONS(X)                                                      \
  X(kScanTurn)         /* the next tile's positions replace those still in use */ \
  X(kScanStageBarrier) /* a tile is overwritten while its outputs are stored */   \
  X(kScanAhead)        /* operands are asked for at the positions of this tile */ \
  X(kScanGateWait)     /* the gate is used before it has come */                  \
  X(kScanTileBarrier)  /* the barrier stands before the tile is written */        \
  X(kScanSumBarrier)   /* the lanes of a channel are added too early */           \
  X(kScanOutBarrier)   /* outputs are stored before they are there */             \
  X(kScanReset)        /* the state goes on where it should restart */            \
  X(kScanCarryReset)   /* a restart in a segment does not end what was before */  \
  X(kScanCarry)        /* a segment begins with zeros */                          \
  X(kScanRestarted)    /* one restart cuts all later segments off */              \
  X(kBackTurn)         /* as forward */                                           \
  X(kBackStageBarrier)                                                            \
  X(kBackAhead)                                                                   \
  X(kBackTileBarrier)                                                             \
  X(kBackSumBarrier)                                                              \
  X(kBackOutBarrier)                                                              \
  X(kBackSumTurn) /* one buffer of sums: the next four steps overwrite it */

#define FD_CONV_MUTATIONS(X)                                                             \
  X(kConvStateBarrier)    /* the state is overwritten by the zeros that stood for it */  \
  X(kConvTileBarrier)     /* the past is read before it is there */                      \
  X(kConvOutBarrier)      /* outputs are stored before they are there */                 \
  X(kConvBackTileBarrier) /* as forward */                                               \
  X(kConvBackSumBarrier)                                                                 \
  X(kConvBackOutBarrier)                                                                 \
  X(kConvHalo)        /* the gradient behind the tile stays without the slope of SiLU */ \
  X(kConvPartBarrier) /* parts are added before they are there */

#define FD_GAUSSIAN_MUTATIONS(X)                                                       \
  X(kFoldHalf)         /* the tap that stands on both ends of a period counts twice */ \
  X(kDoubleSumBarrier) /* a block's sum without waiting for the other warps */         \
  X(kTileBarrier)      /* rows are blurred before the tile has been read */            \
  X(kRowsBarrier)      /* columns are blurred before the rows are */                   \
  X(kRowsInPlace)      /* a warp overwrites rows that its lanes still read */          \
  X(kTileReuse)        /* the next tile is read over one in use */                     \
  X(kTailTap)          /* the last taps of a support are forgotten */                  \
  X(kRingBarrier)      /* rows of the ring overwritten while they are read */          \
  X(kEdgeHalf)         /* the adjoint of reflect keeps its edges whole */              \
  X(kSlideSystem)      /* an elimination reads what others have already replaced */    \
  X(kSlideFold)        /* a window longer than the period is not folded */             \
  X(kSlideEnds)        /* what replicate repeats is not in the first state */          \
  X(kSlideStart)       /* a state is summed before all of its parts are there */       \
  X(kSlideCarry)       /* states are combined before they are there */                 \
  X(kSlidePower)       /* two segments are carried over as if they were one */         \
  X(kSlideTurn)        /* the next outputs replace those still to be stored */         \
  X(kSlideForget)      /* what is not finite is not computed again */                  \
  X(kSlideSpoiled)     /* a block goes on before all have said what is finite */       \
  X(kSlideReuse)       /* the next columns overwrite these */                          \
  X(kProfileBarrier)   /* a box blended before its profile is there */                 \
  X(kBoxEnd)           /* a box that ends one column early */                          \
  X(kSkippedBox)       /* boxes that only touch a tile are skipped */                  \
  X(kLaterMasks)       /* the gradient to an object ignores those blended after it */

#define FD_SPECTRUM_MUTATIONS(X)                                             \
  X(kLoadBarrier)      /* a transform begins before all of it is loaded */   \
  X(kPassBarrier)      /* a pass begins before the last one ended */         \
  X(kTwiddleBarrier)   /* sums over numbers that are not yet turned */       \
  X(kRowsReuse)        /* the next rows overwrite these */                   \
  X(kColumnsReuse)     /* the next columns overwrite these */                \
  X(kGroupReuse)       /* in one launch: the next rows overwrite these */    \
  X(kMagnitudeBarrier) /* rings of numbers that are not yet magnitudes */    \
  X(kPartialBarrier)   /* sums over rings that are not yet there */          \
  X(kUnshifted)        /* DC in the middle along one axis only */            \
  X(kMirrorRow)        /* row ky mirrored where row -ky belongs */           \
  X(kNyquistSlope)     /* the gradient of the Nyquist column is forgotten */ \
  X(kOddRow)           /* the last row of an odd height has no gradient */

#define FD_SPECTRUM_CLUSTER_MUTATIONS(X)                                       \
  X(kClusterReuse)     /* rows of the next image among columns in use */       \
  X(kClusterColumns)   /* columns are transformed before all rows are there */ \
  X(kClusterGroup)     /* the next rows overwrite these */                     \
  X(kClusterPartial)   /* sums over rings that other blocks still add up */    \
  X(kClusterOwner)     /* a number goes to the next owner's columns */         \
  X(kClusterPlace)     /* rows handed over in natural order */                 \
  X(kClusterOdd)       /* the last of an odd number of columns is forgotten */ \
  X(kClusterGather)    /* rows are read before their columns are there */      \
  X(kClusterLeave)     /* columns overwritten while others read them */        \
  X(kClusterBackGroup) /* as kClusterGroup */

#define FD_MUTATIONS(X)     \
  FD_ADALN_MUTATIONS(X)     \
  FD_UPDATE_MUTATIONS(X)    \
  FD_GELU_MUTATIONS(X)      \
  FD_ATTENTION_MUTATIONS(X) \
  FD_HOPPER_MUTATIONS(X)    \
  FD_SCAN_MUTATIONS(X)      \
  FD_CONV_MUTATIONS(X)      \
  FD_GAUSSIAN_MUTATIONS(X)  \
  FD_SPECTRUM_MUTATIONS(X)  \
  FD_SPECTRUM_CLUSTER_MUTATIONS(X)

namespace fastdiff {

enum Mutation : int {
  kNoMutation = 0,
#define FD_X(name) name,
  FD_MUTATIONS(FD_X)
#undef FD_X
};

}  // namespace fastdiff

#ifdef FASTDIFF_EMU
#define FD_MUTATED(name) (::fastdiff::emu::mutation == ::fastdiff::name)
#else
#define FD_MUTATED(name) false
#endif

// __syncthreads() that the named mutation removes.
#define FD_BARRIER(name)                    \
  do {                                      \
    if (!FD_MUTATED(name)) __syncthreads(); \
  } while (false)
