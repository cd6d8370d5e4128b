// Large blocks of memory that go from one tensor to the next instead of back to the system.
//
// The C library hands blocks of 32 MB and more straight back, and the system clears every page that
// it gives out: of a prediction for thousands of atoms that is a fifth of the time.
#include <ATen/ATen.h>
#include <c10/core/CPUAllocator.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace pet {
namespace {

constexpr size_t kLarge = size_t(1) << 20;  // bytes; smaller ones are the C library's business

// A little more than asked for, so that a structure with a few more edges finds its blocks again.
size_t rounded(size_t bytes) {
  size_t step = kLarge / 16;
  while (step * 32 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

struct Shelf;

struct Block {
  at::DataPtr memory;
  size_t size;
  bool used;                     // since the last time that the shelf was tidied
  std::shared_ptr<Shelf> owner;  // while a tensor has it
};

// The free blocks of one owner.
struct Shelf : std::enable_shared_from_this<Shelf> {
  std::mutex lock;
  std::vector<std::unique_ptr<Block>> free;
  bool closed = false;

  // The smallest that fits and does not waste more than a third of itself; else a new one.
  Block* take(size_t bytes, c10::Allocator* base) {
    const std::lock_guard<std::mutex> guard(lock);
    auto best = free.end();
    for (auto block = free.begin(); block != free.end(); ++block) {
      const size_t size = (*block)->size;
      if (size >= bytes && size <= bytes + bytes / 2 &&
          (best == free.end() || size < (*best)->size))
        best = block;
    }
    std::unique_ptr<Block> taken;
    if (best != free.end()) {
      taken = std::move(*best);
      free.erase(best);
    } else {
      const size_t size = rounded(bytes);
      taken.reset(new Block{base->allocate(size), size, true, nullptr});
    }
    taken->used = true;
    taken->owner = shared_from_this();
    return taken.release();
  }

  void put(std::unique_ptr<Block> block) {
    const std::lock_guard<std::mutex> guard(lock);
    if (!closed) free.push_back(std::move(block));
  }

  // What nobody has used since the last time goes back to the system.
  void tidy() {
    const std::lock_guard<std::mutex> guard(lock);
    const auto idle = [](const auto& block) { return !block->used; };
    free.erase(std::remove_if(free.begin(), free.end(), idle), free.end());
    for (auto& block : free) block->used = false;
  }

  void close() {
    const std::lock_guard<std::mutex> guard(lock);
    closed = true;
    free.clear();
  }

  int64_t bytes() {
    const std::lock_guard<std::mutex> guard(lock);
    int64_t sum = 0;
    for (const auto& block : free) sum += int64_t(block->size);
    return sum;
  }
};

void give_back(void* context) {
  std::unique_ptr<Block> block(static_cast<Block*>(context));
  const std::shared_ptr<Shelf> owner = std::move(block->owner);
  owner->put(std::move(block));
}

// The shelf of the prediction that this thread is in. Other threads are served as ever.
thread_local std::shared_ptr<Shelf> current;

struct Allocator final : c10::Allocator {
  c10::Allocator* base = nullptr;

  at::DataPtr allocate(size_t bytes) override {
    if (!current || bytes < kLarge) return base->allocate(bytes);
    Block* block = current->take(bytes, base);
    return {block->memory.get(), block, &give_back, block->memory.device()};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

// In torch's place for as long as a prediction runs anywhere.
struct Place {
  std::mutex lock;
  int64_t inside = 0;
  Allocator own;

  void enter() {
    const std::lock_guard<std::mutex> guard(lock);
    if (inside++ > 0) return;
    own.base = c10::GetCPUAllocator();
    c10::SetCPUAllocator(&own);
  }
  void leave() {
    const std::lock_guard<std::mutex> guard(lock);
    if (--inside == 0 && c10::GetCPUAllocator() == &own) c10::SetCPUAllocator(own.base);
  }
};

Place& place() {
  static Place* const made = new Place;  // never destroyed: tensors may outlive everything
  return *made;
}

struct Blocks : torch::CustomClassHolder {
  std::shared_ptr<Shelf> shelf = std::make_shared<Shelf>();
  std::shared_ptr<Shelf> around;

  ~Blocks() override { shelf->close(); }

  void enter() {
    place().enter();
    around = std::exchange(current, shelf);
  }
  void leave() {
    current = std::exchange(around, nullptr);
    place().leave();
    shelf->tidy();
  }
  int64_t bytes() { return shelf->bytes(); }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(pet_finetune, m) {
  m.class_<Blocks>("Blocks")
      .def(torch::init<>())
      .def("enter", [](const c10::intrusive_ptr<Blocks>& self) { self->enter(); })
      .def("leave", [](const c10::intrusive_ptr<Blocks>& self) { self->leave(); })
      .def("bytes", [](const c10::intrusive_ptr<Blocks>& self) { return self->bytes(); });
}

}  // namespace pet
