//! The audit log: who asked for which change, from where, and how it ended. Lines of JSON in the data directory.
//!
//! One thread writes. What came together is written together and synced once; whoever waits is told after that. The log
//! is bounded: [`FILES`] files of [`FILE_MAX`] bytes, the oldest makes room for the newest.
//!
//! Invariant: numbers go up by one, from the first line to the last, over restarts too; a line is whole or absent. No
//! secret is in it: what is written is method, path, names and ids.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use model::api::{AuditEntry, ErrorCode, Outcome};
use model::{Revision, UnixMillis};
use serde::Deserialize;
use tokio::sync::{mpsc, oneshot, watch};

use crate::files;
use crate::outbox::Entry;

/// How large a file may become, bytes.
const FILE_MAX: u64 = 16 << 20;
/// How many files there are at most.
const FILES: usize = 8;
/// How many lines may wait to be written: whoever comes then waits, too.
const WAITING: usize = 1024;
/// How many lines are synced together at most.
const TOGETHER: usize = 256;
/// How often a reader looks for what seems to be missing.
const LOOKS: usize = 4;
const NEWEST: &str = "audit.jsonl";
/// What becomes the newest.
const NEXT: &str = ".audit.next";

/// A line without its number.
#[derive(Debug, Clone)]
pub(crate) struct Line {
    pub(crate) at: UnixMillis,
    pub(crate) request: String,
    pub(crate) who: String,
    pub(crate) from: String,
    pub(crate) what: String,
    pub(crate) about: Option<String>,
    pub(crate) outcome: Outcome,
    pub(crate) code: Option<ErrorCode>,
    pub(crate) revision: Option<Revision>,
}

impl Line {
    /// A change that was made.
    pub(crate) fn of(entry: Entry, revision: Revision) -> Self {
        Self { revision: Some(revision), ..Self::without_change(entry, None) }
    }

    /// A request that found all as it should be, or was refused.
    pub(crate) fn without_change(entry: Entry, refusal: Option<ErrorCode>) -> Self {
        let Entry { at, request, who, from, what, about } = entry;
        let outcome = match refusal {
            None => Outcome::Done,
            Some(ErrorCode::Internal | ErrorCode::Unavailable) => Outcome::Failed,
            Some(_) => Outcome::Refused,
        };
        Self { at, request, who, from, what, about, outcome, code: refusal, revision: None }
    }

    fn numbered(self, number: u64) -> AuditEntry {
        let Self { at, request, who, from, what, about, outcome, code, revision } = self;
        AuditEntry { number, at, request, who, from, what, about, outcome, code, revision }
    }
}

struct Job {
    line: Line,
    written: oneshot::Sender<()>,
}

/// A line on its way to the disk.
pub(crate) struct Written(Option<oneshot::Receiver<()>>);

impl Written {
    /// Waits until it is on disk; false if it cannot be written.
    pub(crate) async fn written(self) -> bool {
        match self.0 {
            Some(done) => done.await.is_ok(),
            None => false,
        }
    }
}

/// The log. When it is dropped, what waits is written and the thread ends.
pub(crate) struct Audit {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    written: watch::Receiver<u64>,
    directory: PathBuf,
    failures: Arc<AtomicU64>,
}

impl Drop for Audit {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the audit log ended by a fault; its message is above");
        }
    }
}

impl Audit {
    /// Goes on with the log in `directory`.
    pub(crate) fn open(directory: &Path) -> io::Result<Self> {
        let writer = Writer::open(directory, FILE_MAX)?;
        let (jobs, inbox) = mpsc::channel(WAITING);
        let (tell, written) = watch::channel(writer.number);
        let failures = Arc::new(AtomicU64::new(0));
        let counted = failures.clone();
        let thread = std::thread::Builder::new().name("audit".to_owned());
        let thread = thread.spawn(move || writer.run(inbox, &tell, &counted))?;
        let (jobs, thread) = (Some(jobs), Some(thread));
        Ok(Self { jobs, thread, written, directory: directory.to_owned(), failures })
    }

    /// Writes a line, after those before it.
    pub(crate) async fn write(&self, line: Line) -> Written {
        let (written, done) = oneshot::channel();
        if let Some(jobs) = &self.jobs
            && jobs.send(Job { line, written }).await.is_ok()
        {
            return Written(Some(done));
        }
        tracing::error!("the audit log has ended; what happens is not written down");
        Written(None)
    }

    /// How often a line could not be written since the start.
    pub(crate) fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Reads the log from its oldest line on.
    pub(crate) fn reader(&self, since: UnixMillis) -> Reader {
        Reader {
            directory: self.directory.clone(),
            written: self.written.clone(),
            since,
            open: None,
            told: 0,
        }
    }
}

fn file(directory: &Path, age: usize) -> PathBuf {
    directory.join(if age == 0 { NEWEST.to_owned() } else { format!("audit.{age}.jsonl") })
}

struct Writer {
    directory: PathBuf,
    file: File,
    size: u64,
    /// Part of a line may be behind that size: it could not be taken away.
    torn: bool,
    /// That of the last line.
    number: u64,
    most: u64,
}

impl Writer {
    fn open(directory: &Path, most: u64) -> io::Result<Self> {
        let path = file(directory, 0);
        let mut newest = OpenOptions::new().create(true).read(true).append(true).mode(0o600).open(&path)?;
        let mut size = newest.metadata()?.len();
        // A crash may have left half a line.
        let whole = end_of_last_line(&mut newest, size)?;
        if whole < size {
            newest.set_len(whole)?;
            size = whole;
        }
        let number = (0..FILES).find_map(|age| last_number(&file(directory, age))).unwrap_or_default();
        files::sync(directory)?;
        Ok(Self { directory: directory.to_owned(), file: newest, size, torn: false, number, most })
    }

    fn run(mut self, mut inbox: mpsc::Receiver<Job>, tell: &watch::Sender<u64>, failures: &AtomicU64) {
        while let Some(first) = inbox.blocking_recv() {
            let mut jobs = vec![first];
            while jobs.len() < TOGETHER
                && let Ok(job) = inbox.try_recv()
            {
                jobs.push(job);
            }
            let count = jobs.len() as u64;
            let (lines, waiting): (Vec<_>, Vec<_>) =
                jobs.into_iter().map(|job| (job.line, job.written)).unzip();
            match self.write(&lines) {
                Ok(()) => {
                    tell.send_replace(self.number);
                    // Whoever asked may be gone.
                    for written in waiting {
                        let _ = written.send(());
                    }
                }
                Err(error) => {
                    failures.fetch_add(count, Ordering::Relaxed);
                    // Changes wait in the store; other lines are lost.
                    tracing::error!(%error, count, "cannot write the audit log; free space in the data directory");
                    for line in lines.iter().filter(|line| line.revision.is_none()) {
                        tracing::error!(who = line.who, from = line.from, what = line.what, about = line.about,
                            outcome = ?line.outcome, "a request that is not in the audit log");
                    }
                }
            }
        }
    }

    /// All of the lines or none.
    fn write(&mut self, lines: &[Line]) -> io::Result<()> {
        if self.torn {
            self.file.set_len(self.size)?;
            self.torn = false;
        }
        if self.size >= self.most {
            self.rotate()?;
        }
        let mut text = Vec::new();
        for (line, number) in lines.iter().zip(self.number + 1..) {
            serde_json::to_writer(&mut text, &line.clone().numbered(number))?;
            text.push(b'\n');
        }
        let outcome = self.file.write_all(&text).and_then(|()| self.file.sync_data());
        if outcome.is_err() {
            // What was written of it would be half a line.
            self.torn = self.file.set_len(self.size).is_err();
            return outcome;
        }
        self.size += text.len() as u64;
        self.number += lines.len() as u64;
        Ok(())
    }

    /// Begins another file. It is made before the others move, so a disk without room for it costs no old lines.
    fn rotate(&mut self) -> io::Result<()> {
        let next = self.directory.join(NEXT);
        let begun = OpenOptions::new().create(true).append(true).mode(0o600).open(&next)?;
        begun.set_len(0)?;
        // Where a rotation got no further than this, the newest has been moved already.
        let moves = if file(&self.directory, 0).exists() { FILES - 1 } else { 0 };
        for age in (0..moves).rev() {
            match fs::rename(file(&self.directory, age), file(&self.directory, age + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        fs::rename(next, file(&self.directory, 0))?;
        files::sync(&self.directory)?;
        (self.file, self.size) = (begun, 0);
        Ok(())
    }
}

/// Which of these changes have their line. It reads the newest file first, and no more than it needs.
pub(crate) fn known(directory: &Path, wanted: &BTreeMap<Revision, &Entry>) -> io::Result<BTreeSet<Revision>> {
    let mut known = BTreeSet::new();
    for age in 0..FILES {
        if known.len() == wanted.len() {
            break;
        }
        let lines = match File::open(file(directory, age)) {
            Ok(file) => BufReader::new(file).split(b'\n'),
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for line in lines {
            let Ok(line) = serde_json::from_slice::<AuditEntry>(&line?) else { continue };
            // Another life of the store may have had the same revision.
            let is = |entry: &Entry| entry.request == line.request && entry.at == line.at;
            if let Some(revision) = line.revision
                && wanted.get(&revision).is_some_and(|entry| is(entry))
            {
                known.insert(revision);
            }
        }
    }
    Ok(known)
}

/// Where the last line that ends with a newline ends.
fn end_of_last_line(file: &mut File, size: u64) -> io::Result<u64> {
    let mut end = size;
    let mut piece = [0; 4096];
    while end > 0 {
        let begin = end.saturating_sub(piece.len() as u64);
        let piece = &mut piece[..(end - begin) as usize];
        file.seek(SeekFrom::Start(begin))?;
        file.read_exact(piece)?;
        if let Some(at) = piece.iter().rposition(|byte| *byte == b'\n') {
            return Ok(begin + at as u64 + 1);
        }
        end = begin;
    }
    Ok(0)
}

/// What of a line is looked at to choose it.
#[derive(Deserialize)]
struct Head {
    number: u64,
    at: UnixMillis,
}

fn last_number(path: &Path) -> Option<u64> {
    last_number_of(&File::open(path).ok()?)
}

fn last_number_of(mut file: &File) -> Option<u64> {
    let size = file.metadata().ok()?.len();
    // No line is longer than the path, the names and the ids in it. What is no file may have no end.
    let most = 64 << 10;
    file.seek(SeekFrom::Start(size.saturating_sub(most))).ok()?;
    let mut end = Vec::new();
    file.take(most).read_to_end(&mut end).ok()?;
    let heads =
        end.rsplit(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice::<Head>(line).ok());
    heads.map(|head| head.number).next()
}

/// Reads lines in order; the newest, and then what comes, where asked to.
pub(crate) struct Reader {
    directory: PathBuf,
    written: watch::Receiver<u64>,
    since: UnixMillis,
    open: Option<BufReader<File>>,
    /// The number of the last line read.
    told: u64,
}

impl Reader {
    /// The next lines, some at a time; none at the end of what is there. It reads files: call it where that may block.
    pub(crate) fn read(&mut self) -> io::Result<Vec<u8>> {
        let mut lines = Vec::new();
        while lines.len() < 64 << 10 {
            if self.open.is_none() {
                self.open = self.next_file()?.map(BufReader::new);
            }
            let Some(open) = &mut self.open else { break };
            let mut line = Vec::new();
            open.read_until(b'\n', &mut line)?;
            if line.last() != Some(&b'\n') {
                // Half a line is being written: it is read again when it is whole.
                let back = i64::try_from(line.len()).map_err(io::Error::other)?;
                open.seek_relative(-back)?;
                if self.is_newest()? {
                    break;
                }
                // It was rotated away after its last line; that may have come since it was read.
                let mut rest = Vec::new();
                if let Some(open) = &mut self.open {
                    open.read_until(b'\n', &mut rest)?;
                }
                if rest.last() != Some(&b'\n') {
                    self.open = None;
                    continue;
                }
                line = rest;
            }
            if let Ok(head) = serde_json::from_slice::<Head>(&line)
                && head.number > self.told
            {
                self.told = head.number;
                if head.at >= self.since {
                    lines.extend(line);
                }
            }
        }
        Ok(lines)
    }

    /// Ready when lines were written that were not read; false when none will come any more.
    pub(crate) async fn more(&mut self) -> bool {
        let told = self.told;
        self.written.wait_for(|written| *written > told).await.is_ok()
    }

    /// The oldest file with lines after the last one read.
    fn next_file(&self) -> io::Result<Option<File>> {
        // Files move up while one looks from the last to the first: one may have gone past.
        for _ in 1..LOOKS {
            let found = self.look()?;
            if found.as_ref().and_then(first_number).is_some_and(|first| first <= self.told + 1) {
                return Ok(found);
            }
        }
        self.look()
    }

    fn look(&self) -> io::Result<Option<File>> {
        for age in (0..FILES).rev() {
            let mut open = match File::open(file(&self.directory, age)) {
                Ok(open) => open,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            if age == 0 || last_number_of(&open).is_some_and(|last| last > self.told) {
                open.seek(SeekFrom::Start(0))?;
                return Ok(Some(open));
            }
        }
        Ok(None)
    }

    /// Whether what is open is what is written to. While it is exchanged for another there is no such file.
    fn is_newest(&self) -> io::Result<bool> {
        let Some(open) = &self.open else { return Ok(false) };
        let open = open.get_ref().metadata()?;
        match fs::metadata(file(&self.directory, 0)) {
            Ok(newest) => Ok((open.dev(), open.ino()) == (newest.dev(), newest.ino())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

fn first_number(mut file: &File) -> Option<u64> {
    file.seek(SeekFrom::Start(0)).ok()?;
    let mut line = Vec::new();
    BufReader::new(file).read_until(b'\n', &mut line).ok()?;
    file.seek(SeekFrom::Start(0)).ok()?;
    Some(serde_json::from_slice::<Head>(&line).ok()?.number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(about: u64) -> Line {
        Line {
            at: about,
            request: "r".into(),
            who: "key admin".into(),
            from: "127.0.0.1:1".into(),
            what: "POST /networks".into(),
            about: Some(about.to_string()),
            outcome: Outcome::Done,
            code: None,
            revision: Some(Revision(about)),
        }
    }

    fn numbers(lines: &[u8]) -> Vec<u64> {
        let lines = lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        lines.map(|line| serde_json::from_slice::<AuditEntry>(line).unwrap().number).collect()
    }

    fn all(reader: &mut Reader) -> Vec<u64> {
        let mut found = Vec::new();
        loop {
            let lines = reader.read().unwrap();
            if lines.is_empty() {
                return found;
            }
            found.extend(numbers(&lines));
        }
    }

    #[tokio::test]
    async fn lines_are_read_back_in_order_also_after_a_restart_and_half_a_line() {
        let dir = tempfile::tempdir().unwrap();
        let audit = Audit::open(dir.path()).unwrap();
        for n in 1..=5 {
            audit.write(line(n)).await.written().await;
        }
        assert_eq!(all(&mut audit.reader(0)), [1, 2, 3, 4, 5]);
        assert_eq!(all(&mut audit.reader(4)), [4, 5]);
        drop(audit);
        let path = file(dir.path(), 0);
        let whole = fs::metadata(&path).unwrap().len();
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"number\":6,\"a").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let audit = Audit::open(dir.path()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), whole);
        audit.write(line(6)).await.written().await;
        assert_eq!(all(&mut audit.reader(0)), [1, 2, 3, 4, 5, 6]);
    }

    #[tokio::test]
    async fn a_reader_that_follows_gets_what_comes_each_once() {
        let dir = tempfile::tempdir().unwrap();
        let audit = Audit::open(dir.path()).unwrap();
        audit.write(line(1)).await.written().await;
        let mut reader = audit.reader(0);
        assert_eq!(all(&mut reader), [1]);
        audit.write(line(2)).await.written().await;
        assert!(reader.more().await);
        assert_eq!(all(&mut reader), [2]);
        drop(audit);
        assert!(!reader.more().await);
    }

    #[test]
    fn a_log_that_cannot_begin_another_file_loses_none_of_those_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::open(dir.path(), 400).unwrap();
        for n in 1..=3 {
            writer.write(&[line(n)]).unwrap();
        }
        let in_the_way = dir.path().join(NEXT);
        fs::create_dir(&in_the_way).unwrap();
        for _ in 0..2 * FILES {
            writer.write(&[line(4)]).unwrap_err();
        }
        fs::remove_dir(&in_the_way).unwrap();
        writer.write(&[line(4)]).unwrap();
        let (_tell, written) = watch::channel(0);
        let directory = dir.path().to_owned();
        assert_eq!(all(&mut Reader { directory, written, since: 0, open: None, told: 0 }), [1, 2, 3, 4]);
    }

    #[test]
    fn a_reader_is_not_disturbed_while_one_file_is_exchanged_for_another() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::open(dir.path(), 400).unwrap();
        let (_tell, written) = watch::channel(0);
        let directory = dir.path().to_owned();
        let mut reader = Reader { directory, written, since: 0, open: None, told: 0 };
        writer.write(&[line(1)]).unwrap();
        assert_eq!(all(&mut reader), [1]);
        // The newest has been moved, and there is no other yet.
        let in_the_way = file(dir.path(), 0);
        fs::rename(&in_the_way, file(dir.path(), 1)).unwrap();
        assert!(all(&mut reader).is_empty());
        fs::rename(file(dir.path(), 1), &in_the_way).unwrap();
        for n in 2..=3 {
            writer.write(&[line(n)]).unwrap();
        }
        assert_eq!(all(&mut reader), [2, 3]);
    }

    #[test]
    fn a_reader_gets_each_line_that_is_kept_however_often_files_move_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::open(dir.path(), 2_000).unwrap();
        let (_tell, written) = watch::channel(0);
        let directory = dir.path().to_owned();
        let mut reader = Reader { directory, written, since: 0, open: None, told: 0 };
        let (told, heard) = std::sync::mpsc::sync_channel::<()>(40);
        let writing = std::thread::spawn(move || {
            for n in 1..=1_500 {
                writer.write(&[line(n)]).unwrap();
                told.send(()).unwrap();
            }
        });
        // Never so far behind that lines are dropped.
        let mut expected = 0;
        while expected < 1_500 {
            for number in numbers(&reader.read().unwrap()) {
                assert_eq!(number, expected + 1, "passed over");
                expected = number;
                heard.recv().unwrap();
            }
        }
        writing.join().unwrap();
    }

    #[test]
    fn the_log_is_bounded_and_a_reader_passes_from_file_to_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::open(dir.path(), 400).unwrap();
        let (_tell, written) = watch::channel(0);
        let reader = || Reader {
            directory: dir.path().to_owned(),
            written: written.clone(),
            since: 0,
            open: None,
            told: 0,
        };
        writer.write(&[line(1)]).unwrap();
        let mut early = reader();
        assert_eq!(all(&mut early), [1]);
        for n in 2..=100 {
            writer.write(&[line(n)]).unwrap();
        }
        let files = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(files, FILES);
        let kept = all(&mut reader());
        assert_eq!(*kept.last().unwrap(), 100);
        assert!(kept.windows(2).all(|pair| pair[1] == pair[0] + 1), "{kept:?}");
        // The early reader lost what was dropped, and nothing else.
        let later = all(&mut early);
        assert!(
            later.windows(2).all(|pair| pair[1] > pair[0]) && later.ends_with(&kept),
            "{later:?} {kept:?}"
        );
        drop(writer);
        assert_eq!(Writer::open(dir.path(), 400).unwrap().number, 100);
    }
}
