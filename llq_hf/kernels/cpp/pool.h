// Threads that claim chunks of work. The caller works too, and waits only for chunks that another thread has claimed.
// So a thread that the system does not run costs nothing; a static split, as OpenMP's, would wait for it for a
// scheduler's slice.
#pragma once
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

class Pool {
 public:
  // work(chunk) for every chunk below `chunks`, on up to `threads` threads.
  void run(int chunks, int threads, const std::function<void(int)>& work) {
    std::unique_lock<std::mutex> alone(busy_, std::try_to_lock);
    if (threads <= 1 || chunks <= 1 || !alone.owns_lock()) {  // another calling thread uses the pool
      for (int i = 0; i < chunks; i++) work(i);
      return;
    }
    Job job{&work, chunks};
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; started_ < threads - 1; started_++) std::thread([this] { serve(); }).detach();
      job_ = &job;
      wanted_ = threads - 1;
    }
    wake_.notify_all();
    claim(job);
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;  // no other worker may begin
    done_.wait(lock, [&] { return job.inside == 0; });
  }

 private:
  struct Job {
    const std::function<void(int)>* work;
    int chunks;
    std::atomic<int> next{0};
    int inside = 0;  // workers that hold a pointer to this job; under mutex_
  };

  static void claim(Job& job) {
    for (int i; (i = job.next.fetch_add(1)) < job.chunks;) (*job.work)(i);
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return job_ != nullptr && wanted_ > 0 && job_->next < job_->chunks; });
      Job* job = job_;
      wanted_--;
      job->inside++;
      lock.unlock();
      claim(*job);
      lock.lock();
      if (--job->inside == 0) done_.notify_all();
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int wanted_ = 0, started_ = 0;
};

// Never destroyed, as detached workers may still wait in it when the process ends. A forked child has no workers, so it
// gets a new pool.
inline Pool*& pool_slot() {
  static Pool* one = new Pool;
  return one;
}

inline Pool& pool() {
  static const int once = pthread_atfork(nullptr, nullptr, [] { pool_slot() = new Pool; });
  (void)once;
  return *pool_slot();
}
