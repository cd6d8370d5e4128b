// Memory for the tensors of one owner, used again and again instead of fetched from the system anew.
//
// The C library hands blocks of 32 MB and more straight back to the system, which clears every page
// that it gives out: of a prediction for thousands of atoms that is a fifth of the time. Smaller ones
// wander through whatever holes earlier work has left in the heap, so that a training step touches
// half as much memory again as its tensors need at a time.
#include <ATen/ATen.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <torch/custom_class.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

namespace pet {
namespace {

constexpr size_t kSmallest = size_t(1) << 14;  // bytes; smaller ones are the C library's business
constexpr size_t kPage = size_t(1) << 12;

size_t in_pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// Addresses as far as the machine has memory. A page costs nothing before it is written to.
class Region {
 public:
  ~Region() {
    if (start_ == nullptr) return;
    {
      const std::lock_guard<std::mutex> guard(all().lock);
      all().ends.erase(start_);
    }
    munmap(start_, size_);
  }

  // Whether an address belongs to any region.
  static bool holds(const void* address) {
    const char* const place = static_cast<const char*>(address);
    const std::lock_guard<std::mutex> guard(all().lock);
    const auto after = all().ends.upper_bound(place);
    return after != all().ends.begin() && place < std::prev(after)->second;
  }

  // At the lowest address where it fits, so that what lies above is left alone; null if nowhere.
  char* take(size_t bytes) {
    const std::lock_guard<std::mutex> guard(lock_);
    if (closed_) return nullptr;
    reserve();
    const auto found = std::find_if(free_.begin(), free_.end(), [bytes](const auto& range) {
      return range.second >= bytes;
    });
    if (found == free_.end()) return nullptr;
    char* const taken = found->first;
    const size_t left = found->second - bytes;
    free_.erase(found);
    if (left > 0) free_.emplace(taken + bytes, left);
    used_ += bytes;
    top_ = std::max(top_, taken + bytes);
    return taken;
  }

  void put(char* block, size_t bytes) {
    const std::lock_guard<std::mutex> guard(lock_);
    if (closed_) madvise(block, bytes, MADV_DONTNEED);
    used_ -= bytes;
    auto range = free_.emplace(block, bytes).first;
    const auto after = std::next(range);
    if (after != free_.end() && block + bytes == after->first) {
      range->second += after->second;
      free_.erase(after);
    }
    if (range == free_.begin()) return;
    const auto before = std::prev(range);
    if (before->first + before->second != block) return;
    before->second += range->second;
    free_.erase(range);
  }

  // What lies above all that was used since the last time goes back to the system.
  void tidy() {
    const std::lock_guard<std::mutex> guard(lock_);
    if (touched_ > top_) madvise(top_, size_t(touched_ - top_), MADV_DONTNEED);
    touched_ = top_;
    top_ = end_of_used();
  }

  // All that is free goes back, now and from now on.
  void close() {
    const std::lock_guard<std::mutex> guard(lock_);
    closed_ = true;
    for (const auto& [block, bytes] : free_) madvise(block, bytes, MADV_DONTNEED);
  }

  // Free, and ready to be used again.
  int64_t bytes() {
    const std::lock_guard<std::mutex> guard(lock_);
    return int64_t(std::max(top_, touched_) - start_) - int64_t(used_);
  }

 private:
  void reserve() {
    if (start_ != nullptr || refused_) return;
    const size_t size = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE));
    void* const found = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    refused_ = found == MAP_FAILED;
    if (refused_) return;
    start_ = top_ = touched_ = static_cast<char*>(found);
    size_ = size;
    free_.emplace(start_, size_);
    const std::lock_guard<std::mutex> guard(all().lock);
    all().ends.emplace(start_, start_ + size_);
  }

  struct All {
    std::mutex lock;
    std::map<const char*, const char*> ends;  // by start
  };
  static All& all() {
    static All* const made = new All;
    return *made;
  }

  char* end_of_used() const {
    if (free_.empty()) return start_ + size_;
    const auto& [block, bytes] = *free_.rbegin();
    return block + bytes == start_ + size_ ? block : start_ + size_;
  }

  std::mutex lock_;
  std::map<char*, size_t> free_;  // by address, never two in a row
  char* start_ = nullptr;
  char* top_ = nullptr;      // end of what was used since the last time that it was tidied
  char* touched_ = nullptr;  // end of what was used before
  size_t size_ = 0, used_ = 0;
  bool refused_ = false, closed_ = false;
};

// In front of each tensor's numbers. Torch wants to find its memory again by their address alone.
struct alignas(64) Header {
  std::shared_ptr<Region> region;
  size_t bytes;
};

void give_back(void* numbers) {
  Header* const header = static_cast<Header*>(numbers) - 1;
  const std::shared_ptr<Region> region = std::move(header->region);  // may be the last to hold it
  const size_t bytes = header->bytes;
  header->~Header();
  region->put(reinterpret_cast<char*>(header), bytes);
}

// The region of the owner whose work this thread is in. Other threads are served as ever.
thread_local std::shared_ptr<Region> current;

// In torch's place from the first work on and for good: what libraries below torch take while a
// region is in use they may give back much later.
struct Allocator final : c10::Allocator {
  c10::Allocator* base = nullptr;

  at::DataPtr allocate(size_t bytes) override {
    if (!current || bytes < kSmallest) return base->allocate(bytes);
    const size_t whole = in_pages(bytes + sizeof(Header));
    char* const start = current->take(whole);
    if (start == nullptr) return base->allocate(bytes);
    void* const numbers = new (start) Header{current, whole} + 1;
    return {numbers, numbers, &give_back, at::Device(at::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &delete_any; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  static Allocator& installed() {
    static Allocator* const made = [] {
      Allocator* const own = new Allocator;  // never destroyed: tensors may outlive everything
      own->base = c10::GetCPUAllocator();
      c10::SetCPUAllocator(own);
      return own;
    }();
    return *made;
  }

 private:
  static void delete_any(void* numbers) {
    if (numbers == nullptr) return;
    if (Region::holds(numbers))
      give_back(numbers);
    else
      installed().base->raw_deleter()(numbers);
  }
};

struct Arena : torch::CustomClassHolder {
  std::shared_ptr<Region> region = std::make_shared<Region>();
  std::shared_ptr<Region> around;

  ~Arena() override { region->close(); }

  void enter() {
    Allocator::installed();
    around = std::exchange(current, region);
  }
  void leave() {
    current = std::exchange(around, nullptr);
    region->tidy();
  }
  int64_t bytes() { return region->bytes(); }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(pet_finetune, m) {
  m.class_<Arena>("Arena")
      .def(torch::init<>())
      .def("enter", [](const c10::intrusive_ptr<Arena>& self) { self->enter(); })
      .def("leave", [](const c10::intrusive_ptr<Arena>& self) { self->leave(); })
      .def("bytes", [](const c10::intrusive_ptr<Arena>& self) { return self->bytes(); });
}

}  // namespace pet
