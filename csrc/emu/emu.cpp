// The scheduler behind emu.h. One launch at a time, on the calling thread; every CUDA thread of a block is a fiber
// (ucontext) with its own stack, blocks run one after the other.
#include "emu.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../cuda/mutate.cuh"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastdiff {
namespace emu {

Position here;
int mutation = 0;
int64_t grid_limit = 0x7fffffff;
int multiprocessors = 4;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr int kWarp = 32;
constexpr size_t kSharedLimit = 227 << 10;  // of one block on sm_90

enum State { kReady, kAtBarrier, kAtCollective, kReturned };

struct Site {
  const char* file = "";
  int line = 0;
  bool operator==(const Site& o) const { return line == o.line && strcmp(file, o.file) == 0; }
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};

struct Copy {
  void* to;
  std::vector<char> bytes;  // as they were when the copy was asked for
};

constexpr uint32_t kPoison = 0xffb1ffb1u;  // NaN as float32, as two float16 and as two bfloat16

void poison(void* p, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) static_cast<char*>(p)[i] = reinterpret_cast<const char*>(&kPoison)[i % 4];
}

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  dim3 thread;
  State state = kReady;
  Site site;          // where it waits
  unsigned mask = 0;  // of the collective it waits in
  int source = 0;
  uint64_t value = 0;                     // brought to, then taken from, the collective
  size_t blob = 0;                        // bytes at `value`, for a gather
  std::vector<std::vector<Copy>> copies;  // in flight: groups, the last of them still open
};

struct Warp {
  unsigned ready = 0;    // lanes
  unsigned waiting = 0;  // lanes in a collective
  std::vector<unsigned char> gathered = std::vector<unsigned char>(kWarp * kBlob);
};

struct Scheduler {
  std::mutex mutex;
  uint64_t random = 1;
  bool lockstep = false;
  int64_t switches = 0;

  std::vector<Fiber> fibers;  // grown as needed, never shrunk: stacks are reused
  std::vector<Warp> warps;
  int threads = 0;  // of the current block
  Fiber* running = nullptr;
  ucontext_t host;
  const void* host_stack = nullptr;
  size_t host_stack_size = 0;
  const std::function<void()>* body = nullptr;
  std::string error;
  std::map<const void*, std::pair<void*, size_t>> shared_arrays;
  size_t shared_bytes = 0;

  Scheduler() {
    const char* text = getenv("FASTDIFF_EMU_SEED");
    random = text != nullptr ? strtoull(text, nullptr, 10) : 0;
  }
  ~Scheduler() {
    for (Fiber& f : fibers)
      if (f.stack != nullptr) munmap(f.stack, kStack);
  }

  uint32_t draw(uint32_t below) {  // splitmix64
    uint64_t z = (random += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>((z ^ (z >> 31)) >> 32) % below;
  }

  int index(const Fiber& f) const { return static_cast<int>(&f - fibers.data()); }
  void set_ready(Fiber& f) { f.state = kReady, warps[index(f) / kWarp].ready |= 1u << index(f) % kWarp; }

  void* allocate_shared(const void* tag, size_t bytes);
  void free_shared();
  void start(Fiber* f);
  void resume(Fiber* f);
  void wait(State state, const Site& site);
  void fail(const std::string& what);
  void run_ready();
  void run_warp(int warp, int burst);
  void release_barrier();
  std::string who_waits() const;
  void run_block();
};

Scheduler& scheduler() {
  static Scheduler s;
  return s;
}

// Leaves the fiber for ever: on return, or after an error.
void leave() {
  Scheduler& s = scheduler();
  Fiber* f = s.running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, s.host_stack, s.host_stack_size);  // null: its fake stack is freed
#endif
  swapcontext(&f->context, &s.host);
  abort();
}

void fiber_main() {
  Scheduler& s = scheduler();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &s.host_stack, &s.host_stack_size);
#endif
  (*s.body)();
  for (const auto& group : s.running->copies)
    if (!group.empty()) s.fail("a thread returns with copies in flight");
  s.running->copies.clear();
  s.running->state = kReturned;
  leave();
}

void Scheduler::start(Fiber* f) {
  if (f->stack == nullptr) {
    void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("emulator: no memory for a stack");
    f->stack = static_cast<char*>(p);
    mprotect(f->stack, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);  // an overflow faults
  }
#if defined(__SANITIZE_ADDRESS__)
  // The last fiber here left in the middle of fiber_main, or, after an error, of the kernel.
  const size_t stale = f->state == kReturned ? 4096 : kStack;
  __asan_unpoison_memory_region(f->stack + kStack - stale, stale);
#endif
  getcontext(&f->context);
  f->context.uc_stack.ss_sp = f->stack;
  f->context.uc_stack.ss_size = kStack;
  f->context.uc_link = nullptr;
  makecontext(&f->context, fiber_main, 0);
  f->fake_stack = nullptr;
  f->copies.clear();
  set_ready(*f);
}

void Scheduler::resume(Fiber* f) {
  ++switches;
  running = f;
  here.thread = f->thread;
  warps[index(*f) / kWarp].ready &= ~(1u << index(*f) % kWarp);
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, f->stack, kStack);
#endif
  swapcontext(&host, &f->context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  running = nullptr;
}

void Scheduler::wait(State state, const Site& site) {
  Fiber* f = running;
  f->state = state, f->site = site;
  if (state == kAtCollective) {  // the last lane to arrive completes it
    Warp& warp = warps[index(*f) / kWarp];
    Fiber* const lanes = &fibers[index(*f) / kWarp * kWarp];
    warp.waiting |= 1u << index(*f) % kWarp;
    bool complete = (warp.waiting & f->mask) == f->mask;
    for (int i = 0; i < kWarp && complete; ++i)
      if (f->mask >> i & 1) complete = lanes[i].mask == f->mask && lanes[i].site == f->site;
    if (complete) {
      uint64_t brought[kWarp];
      for (int i = 0; i < kWarp; ++i) {
        if ((f->mask >> i & 1) == 0) continue;
        brought[i] = lanes[i].value;
        if (lanes[i].blob > 0)
          memcpy(&warp.gathered[i * kBlob], reinterpret_cast<const void*>(lanes[i].value), lanes[i].blob);
      }
      warp.waiting &= ~f->mask;
      for (int i = 0; i < kWarp; ++i)
        if (f->mask >> i & 1) lanes[i].value = brought[lanes[i].source], set_ready(lanes[i]);
    }
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&f->fake_stack, host_stack, host_stack_size);
#endif
  swapcontext(&f->context, &host);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f->fake_stack, &host_stack, &host_stack_size);
#endif
}

void Scheduler::fail(const std::string& what) {
  error = what;
  leave();
}

void Scheduler::run_warp(int warp, int burst) {
  for (; burst > 0 && warps[warp].ready != 0 && error.empty(); --burst) {
    unsigned ready = warps[warp].ready;
    for (uint32_t skip = draw(static_cast<uint32_t>(__builtin_popcount(ready))); skip > 0; --skip) ready &= ready - 1;
    resume(&fibers[warp * kWarp + __builtin_ctz(ready)]);
  }
}

void Scheduler::run_ready() {
  if (lockstep) {
    for (size_t w = 0; w < warps.size(); ++w)
      for (unsigned round = warps[w].ready; round != 0 && error.empty(); round &= round - 1)
        resume(&fibers[w * kWarp + __builtin_ctz(round)]);
    return;
  }
  std::vector<int> candidates;
  for (size_t w = 0; w < warps.size(); ++w)
    if (warps[w].ready != 0) candidates.push_back(static_cast<int>(w));
  if (!candidates.empty()) run_warp(candidates[draw(static_cast<uint32_t>(candidates.size()))], 1 + draw(4 * kWarp));
}

std::string Scheduler::who_waits() const {
  std::map<std::string, int> groups;
  for (int i = 0; i < threads; ++i) {
    const Fiber& f = fibers[i];
    char mask[16];
    snprintf(mask, sizeof mask, "%08x", f.mask);
    if (f.state == kReturned)
      ++groups["have returned"];
    else if (f.state == kAtBarrier)
      ++groups["wait at the barrier " + f.site.text()];
    else
      ++groups["wait in a warp operation for lanes " + std::string(mask) + " at " + f.site.text()];
  }
  std::string text;
  for (const auto& g : groups) text += (text.empty() ? "" : ", ") + std::to_string(g.second) + " threads " + g.first;
  return text;
}

void Scheduler::release_barrier() {
  for (int i = 0; i < threads; ++i)
    if (fibers[i].state != kAtBarrier || !(fibers[i].site == fibers[0].site)) {
      error = "threads wait for each other for ever: " + who_waits();
      return;
    }
  for (int i = 0; i < threads; ++i) set_ready(fibers[i]);
}

void* Scheduler::allocate_shared(const void* tag, size_t bytes) {
  auto& entry = shared_arrays[tag];
  if (entry.first == nullptr) {
    entry = {malloc(bytes), bytes};
    if (entry.first == nullptr) abort();
    shared_bytes += bytes;
    poison(entry.first, bytes);
  }
  return entry.first;
}

void Scheduler::free_shared() {
  for (auto& entry : shared_arrays) free(entry.second.first);
  shared_arrays.clear(), shared_bytes = 0;
}

void Scheduler::run_block() {
  warps.assign((threads + kWarp - 1) / kWarp, Warp());
  for (int i = 0; i < threads; ++i) {
    const dim3& d = here.block_dim;
    fibers[i].thread = dim3(i % d.x, i / d.x % d.y, i / d.x / d.y);
    start(&fibers[i]);
  }
  const auto any = [&](auto test) {
    for (const Warp& w : warps)
      if (test(w)) return true;
    return false;
  };
  while (error.empty()) {
    if (any([](const Warp& w) { return w.ready != 0; })) {
      run_ready();
      continue;
    }
    bool done = true;
    for (int i = 0; i < threads; ++i) done = done && fibers[i].state == kReturned;
    if (done) break;
    release_barrier();
  }
}

}  // namespace

void seed(uint64_t value) { scheduler().random = value; }
void set_lockstep(bool on) { scheduler().lockstep = on; }
int64_t switches() { return scheduler().switches; }

void* shared(const void* tag, size_t bytes) {
  Scheduler& s = scheduler();
  void* p = s.allocate_shared(tag, bytes);
  if (s.shared_bytes > kSharedLimit) s.fail("a block uses more shared memory than there is");
  return p;
}
void* dynamic_shared() { return scheduler().shared_arrays[nullptr].first; }

void fault(const char* what) { scheduler().fail(what); }

void syncthreads(const char* file, int line) { scheduler().wait(kAtBarrier, {file, line}); }

uint64_t collective(unsigned mask, uint64_t value, int source, const char* file, int line) {
  Scheduler& s = scheduler();
  Fiber* f = s.running;
  const Site site{file, line};
  if ((mask >> lane() & 1) == 0) s.fail("a lane calls a warp operation whose mask does not name it, at " + site.text());
  if ((mask >> source & 1) == 0) s.fail("a lane reads from one that the mask does not name, at " + site.text());
  f->mask = mask, f->source = source, f->value = value, f->blob = 0;
  s.wait(kAtCollective, site);
  return f->value;
}

const unsigned char* gather(unsigned mask, const void* mine, size_t bytes, const char* file, int line) {
  Scheduler& s = scheduler();
  Fiber* f = s.running;
  if (bytes > kBlob) s.fail("a lane brings more than a gather takes");
  if ((mask >> lane() & 1) == 0) s.fail("a lane calls a warp operation whose mask does not name it");
  f->mask = mask, f->source = lane(), f->value = reinterpret_cast<uint64_t>(mine), f->blob = bytes;
  s.wait(kAtCollective, {file, line});
  return s.warps[s.index(*f) / kWarp].gathered.data();
}

unsigned ballot(unsigned mask, int predicate, const char* file, int line) {
  const unsigned char* all = gather(mask, &predicate, sizeof predicate, file, line);
  unsigned found = 0;
  for (int i = 0; i < kWarp; ++i)
    if ((mask >> i & 1) != 0 && all[i * kBlob] != 0) found |= 1u << i;
  return found;
}

void copy_async(void* to, const void* from, size_t bytes, size_t valid) {
  auto& groups = scheduler().running->copies;
  if (groups.empty()) groups.emplace_back();
  std::vector<char> values(bytes);
  if (valid > 0) memcpy(values.data(), from, valid);
  poison(to, bytes);
  groups.back().push_back({to, std::move(values)});
}

void commit_copies() {
  auto& groups = scheduler().running->copies;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}

void wait_copies(int groups_left) {
  auto& groups = scheduler().running->copies;
  while (static_cast<int>(groups.size()) > groups_left + 1) {  // the open group is never waited for
    for (const Copy& c : groups.front()) memcpy(c.to, c.bytes.data(), c.bytes.size());
    groups.erase(groups.begin());
  }
}

void launch(const char* kernel, dim3 grid, dim3 block, size_t smem, const std::function<void()>& body) {
  Scheduler& s = scheduler();
  const std::lock_guard<std::mutex> lock(s.mutex);
  const uint64_t threads = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || block.z > 64 || blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535 || smem > kSharedLimit)
    throw std::runtime_error(std::string(kernel) + ": invalid configuration argument");
  s.threads = static_cast<int>(threads);
  if (s.fibers.size() < threads) s.fibers.resize((threads + kWarp - 1) / kWarp * kWarp);
  s.body = &body;
  s.error.clear();
  here.block_dim = block, here.grid_dim = grid;
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), uint64_t{0});
  if (!s.lockstep)
    for (uint64_t i = blocks - 1; i > 0; --i) std::swap(order[i], order[s.draw(static_cast<uint32_t>(i + 1))]);
  for (const uint64_t i : order) {
    here.block = dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                      static_cast<unsigned>(i / grid.x / grid.y));
    if (smem > 0) s.allocate_shared(nullptr, smem);
    s.run_block();
    s.free_shared();
    if (!s.error.empty())
      throw std::runtime_error(std::string(kernel) + ", block (" + std::to_string(here.block.x) + ", " +
                               std::to_string(here.block.y) + ", " + std::to_string(here.block.z) + "): " + s.error);
  }
}

}  // namespace emu
}  // namespace fastdiff

// The knobs, for a test that has loaded the library (ctypes).
#define FD_EXPORT extern "C" __attribute__((visibility("default")))

FD_EXPORT void emu_seed(uint64_t value) { fastdiff::emu::seed(value); }
FD_EXPORT void emu_lockstep(int on) { fastdiff::emu::set_lockstep(on != 0); }
FD_EXPORT void emu_grid_limit(int64_t blocks) { fastdiff::emu::grid_limit = blocks; }
FD_EXPORT void emu_multiprocessors(int count) { fastdiff::emu::multiprocessors = count; }
FD_EXPORT int64_t emu_switches() { return fastdiff::emu::switches(); }
FD_EXPORT void emu_mutate(int mutation) { fastdiff::emu::mutation = mutation; }
FD_EXPORT const char* emu_mutations() {  // their names, from number 1 on
#define FD_X(name) #name " "
  return FD_MUTATIONS(FD_X);
#undef FD_X
}
